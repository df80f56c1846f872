"""The first prompts of each source, tokenized as the run will do it with all: how long they are. Needs no model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_rpp.config.schema import Config
from megatron_rpp.config.sources import HELD_OUT, is_verified, source_keys
from megatron_rpp.data.prompts import load_demonstrations, load_prompts, prompt_limit
from megatron_rpp.data.tokenizer import Tokenizer

FIRST = 1000


@dataclass(frozen=True)
class Longest:
    """The longest of a source's first prompts, or demonstrations."""

    key: str  # of the configuration: data.train, data.evals.aime, sft.data
    count: int  # looked at
    tokens: int
    limit: int  # the most that there may be

    def __str__(self) -> str:
        what = "demonstrations" if self.key == "sft.data" else "prompts"
        return f"{self.key}: of the first {self.count} {what} the longest is {self.tokens} tokens; limit {self.limit}"


def longest_prompts(config: Config, tokenizer: Tokenizer) -> list[Longest]:
    """One for each source that `rpp train` reads. Raises ValueError as `load_prompts`, for these prompts."""
    found = []
    for key, source in source_keys(config).items():
        most = min(FIRST, config.eval.num_prompts) if key.startswith(HELD_OUT) else FIRST
        first = replace(source, size=min(source.size or most, most))
        prompts = load_prompts(
            first,
            config.data,
            tokenizer,
            max_prompt_tokens=prompt_limit(config),
            needs_answer=is_verified(config, source),
        )
        lengths = [len(prompt.token_ids) for prompt in prompts]
        found.append(Longest(key, len(prompts), max(lengths), prompt_limit(config)))
    return found


def longest_demonstration(config: Config, tokenizer: Tokenizer) -> Longest:
    """Of sft.data, prompt and response together. Raises ValueError as `load_demonstrations`."""
    limit = config.rollout.context_length
    pairs = load_demonstrations(config.sft.data, tokenizer, config.data, max_tokens=limit, most=FIRST)
    return Longest("sft.data", len(pairs), max(len(prompt) + len(response) for prompt, response in pairs), limit)
