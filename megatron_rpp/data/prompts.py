"""Prompts and demonstrations: read or generated once, formatted and tokenized."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

from megatron_rpp.config.data import DataConfig, SourceConfig
from megatron_rpp.config.schema import Config
from megatron_rpp.config.sources import held_out_sources, is_verified, training_sources
from megatron_rpp.config.templates import DEFAULT
from megatron_rpp.data.jsonl import first_present, read_jsonl
from megatron_rpp.data.problems import Tally, read_problems
from megatron_rpp.data.questions import format_prompt
from megatron_rpp.data.tokenizer import Tokenizer
from megatron_rpp.experience.types import Prompt

logger = logging.getLogger(__name__)

_TAIL = 16  # tokens: more than `<think>` and line ends are


def load_training_prompts(config: Config, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts of data.train, or of all data.sources, with ids from 0 on. Raises as `load_prompts`."""
    is_ordered = config.data.curriculum == "easy_first"
    return _load_all(training_sources(config.data), config, tokenizer, needs_pass_rate=is_ordered)


def load_eval_prompts(config: Config, tokenizer: Tokenizer) -> list[Prompt]:
    """At most eval.num_prompts of each held-out set, told apart by Prompt.source; none where nothing is evaluated."""
    most = config.eval.num_prompts
    sources = {name: replace(s, size=min(s.size or most, most)) for name, s in held_out_sources(config).items()}
    return _load_all(sources, config, tokenizer, needs_pass_rate=False)


def _load_all(
    sources: Mapping[str, SourceConfig], config: Config, tokenizer: Tokenizer, *, needs_pass_rate: bool
) -> list[Prompt]:
    prompts: list[Prompt] = []
    for name, source in sources.items():
        prompts += load_prompts(
            source,
            config.data,
            tokenizer,
            max_prompt_tokens=prompt_limit(config),
            name=name,
            first_id=len(prompts),
            needs_answer=is_verified(config, source),
            needs_pass_rate=needs_pass_rate,
        )
    return prompts


def prompt_limit(config: Config) -> int:
    """The most tokens of a prompt: what the longest response leaves of the context."""
    return config.rollout.context_length - config.rollout.max_response_tokens


def load_prompts(
    source: SourceConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    name: str = "",
    first_id: int = 0,
    needs_answer: bool = True,
    needs_pass_rate: bool = False,
) -> list[Prompt]:
    """All prompts of one source, tokenized.

    Args:
        source: data.train, or of data.sources or data.evals.
        data: gives chat_template, and prompt_template where the source has none.
        tokenizer: of the policy.
        max_prompt_tokens: `prompt_limit`.
        name: of the source; empty for data.train.
        first_id: of the first prompt.
        needs_answer, needs_pass_rate: as `read_problems`.

    Raises:
        ValueError: as `read_problems`; a prompt that is too long.
    """
    tally = Tally()
    problems = list(
        read_problems(source, data, needs_answer=needs_answer, needs_pass_rate=needs_pass_rate, tally=tally)
    )
    logger.info("%s: %s", f"{name} ({source.path or source.task})" if name else source.path or source.task, tally)
    ids = tokenizer.encode_prompts([p.turns or p.text for p in problems], chat=data.chat_template)
    for problem, tokens in zip(problems, ids, strict=True):
        _check_length(problem.where, len(tokens), max_prompt_tokens)
    return [
        Prompt(
            i, p.text, tuple(tokens), p.answer, p.metadata, source=name, pass_rate=p.pass_rate, turns=p.turns,
            opens_thought=tokenizer.decode(tokens[-_TAIL:]).rstrip().endswith("<think>"),
        )
        for i, (p, tokens) in enumerate(zip(problems, ids, strict=True), start=first_id)
    ]  # fmt: skip


def load_demonstrations(
    path: str | Path,
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    max_tokens: int | None = None,
    most: int | None = None,
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids with one end token) of each demonstration, for supervised training.

    Prompts are formatted and tokenized exactly as `load_prompts` does, so that the warm start sees
    what reinforcement learning will ask. `max_tokens` limits prompt plus response; of the file
    the first `most` are read, else all.

    Raises:
        ValueError: as `load_prompts`; the keys are `prompt`, unless data.prompt_template names others,
            and `response` or `answer`.
    """
    records = [(f"{path}:{number}", record) for number, record in islice(read_jsonl(path), most)]
    texts = [format_prompt(DEFAULT, data.prompt_template, record, where) for where, record in records]
    responses = [first_present(record, ("response", "answer"), where) for where, record in records]
    prompt_ids = tokenizer.encode_prompts(texts, chat=data.chat_template)
    end = tokenizer.eos_token_ids[0]
    pairs = [(p, [*r, end]) for p, r in zip(prompt_ids, tokenizer.encode_many(responses), strict=True)]
    for (where, _), (prompt, response) in zip(records, pairs, strict=True):
        if max_tokens is not None and len(prompt) + len(response) > max_tokens:
            raise ValueError(
                f"{where}: prompt and response are {len(prompt) + len(response)} tokens, more than "
                f"rollout.context_length={max_tokens}; raise it or shorten the demonstration"
            )
    return pairs


def _check_length(where: str, tokens: int, limit: int) -> None:
    if tokens > limit:
        raise ValueError(
            f"{where}: the prompt is {tokens} tokens, the limit is {limit}; raise rollout.context_length, "
            "lower rollout.max_response_tokens, or shorten the prompt"
        )
    if tokens == 0:
        raise ValueError(f"{where}: the prompt is empty; check the prompt_template and the line")
