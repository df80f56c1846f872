"""Prompts: read or generated once, then served in an order that a resumed run repeats."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_rpp.config.data import DataConfig, SourceConfig
from megatron_rpp.data.jsonl import first_present, list_names, read_jsonl
from megatron_rpp.data.tokenizer import Tokenizer
from megatron_rpp.experience.types import Prompt


@dataclass(frozen=True)
class Problem:
    """One problem before tokenization."""

    where: str  # how an error names it: PATH:LINE or TASK[INDEX]
    fields: Mapping[str, Any]  # what data.prompt_template may name
    answer: str
    metadata: dict[str, Any]  # what the verifier may want


def load_prompts(
    source: SourceConfig, data: DataConfig, tokenizer: Tokenizer, *, max_prompt_tokens: int
) -> list[Prompt]:
    """All prompts of one source, tokenized.

    Args:
        source: data.train or data.eval.
        data: gives prompt_template and chat_template.
        tokenizer: of the policy.
        max_prompt_tokens: rollout.context_length - rollout.max_response_tokens.

    Raises:
        ValueError: a malformed line, an unknown template key, a prompt that is too long, an unknown task.
    """
    if source.size == 0:
        return []
    problems = list(_problems(source))
    texts = [format_prompt(data.prompt_template, p.fields, p.where) for p in problems]
    ids = _tokenize(texts, data, tokenizer)
    for problem, tokens in zip(problems, ids, strict=True):
        _check_length(problem.where, len(tokens), max_prompt_tokens)
    return [
        Prompt(id=i, text=text, token_ids=tuple(tokens), answer=p.answer, metadata=p.metadata)
        for i, (p, text, tokens) in enumerate(zip(problems, texts, ids, strict=True))
    ]


def load_demonstrations(
    path: str | Path, tokenizer: Tokenizer, data: DataConfig, *, max_tokens: int | None = None
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids with one end token) of each demonstration, for supervised training.

    Prompts are formatted and tokenized exactly as `load_prompts` does, so that the warm start sees
    what reinforcement learning will ask. `max_tokens` limits prompt plus response.

    Raises:
        ValueError: as `load_prompts`; the keys are `prompt`, unless data.prompt_template names others,
            and `response` or `answer`.
    """
    records = [(f"{path}:{number}", record) for number, record in read_jsonl(path)]
    texts = [format_prompt(data.prompt_template, record, where) for where, record in records]
    responses = [first_present(record, ("response", "answer"), where) for where, record in records]
    prompt_ids = _tokenize(texts, data, tokenizer)
    end = tokenizer.eos_token_ids[0]
    pairs = [(p, [*r, end]) for p, r in zip(prompt_ids, tokenizer.encode_many(responses), strict=True)]
    for (where, _), (prompt, response) in zip(records, pairs, strict=True):
        if max_tokens is not None and len(prompt) + len(response) > max_tokens:
            raise ValueError(
                f"{where}: prompt and response are {len(prompt) + len(response)} tokens, more than "
                f"rollout.context_length={max_tokens}; raise it or shorten the demonstration"
            )
    return pairs


def format_prompt(template: str, fields: Mapping[str, Any], where: str) -> str:
    """`template` with the names in braces replaced from `fields`."""
    try:
        return template.format_map(fields)
    except KeyError as error:
        raise ValueError(
            f"{where}: data.prompt_template names `{error.args[0]}`, which is not there; "
            f"available: {list_names(list(fields))}"
        ) from None
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(
            f"data.prompt_template={template!r} is not a valid template ({error}); "
            "write a key as {prompt} and a literal brace as {{ or }}"
        ) from None


def _tokenize(texts: list[str], data: DataConfig, tokenizer: Tokenizer) -> list[list[int]]:
    return tokenizer.encode_prompts(texts, chat=data.chat_template)


def _check_length(where: str, tokens: int, limit: int) -> None:
    if tokens > limit:
        raise ValueError(
            f"{where}: the prompt is {tokens} tokens, the limit is {limit}; raise rollout.context_length, "
            "lower rollout.max_response_tokens, or shorten the prompt"
        )
    if tokens == 0:
        raise ValueError(f"{where}: the prompt is empty; check data.prompt_template and the line")


def _problems(source: SourceConfig) -> Iterator[Problem]:
    if source.kind == "jsonl":
        return _jsonl_problems(source)
    if source.kind == "reasoning_gym":
        from megatron_rpp.data.reasoning_gym import gym_problems

        return (
            Problem(f"{source.task}[{i}]", fields, fields["answer"], entry)
            for i, (fields, entry) in enumerate(gym_problems(source))
        )
    raise ValueError(f"source kind={source.kind!r} is unknown; use jsonl or reasoning_gym")


def _jsonl_problems(source: SourceConfig) -> Iterator[Problem]:
    for number, record in islice(read_jsonl(source.path), source.size):
        where = f"{source.path}:{number}"
        yield Problem(where, record, first_present(record, ("answer",), where), record)


class PromptSource:
    """Serves `num_prompts` prompts at a time, each prompt once an epoch, in a seeded order.

    The position is one integer, so a resumed run gets what an uninterrupted one would get.
    """

    def __init__(self, prompts: Sequence[Prompt], num_prompts: int, seed: int) -> None:
        if num_prompts < 1 or num_prompts > len(prompts):
            raise ValueError(
                f"rollout.num_prompts={num_prompts} must be between 1 and the {len(prompts)} prompts of "
                "data.train; lower it or give more prompts (data.train.size)"
            )
        self._prompts = prompts
        self._num_prompts = num_prompts
        self._seed = seed
        self._served = 0  # prompts since the start of the run
        self._epoch = -1
        self._order: list[int] = []

    def next_batch(self) -> list[Prompt]:
        """The next `num_prompts` prompts; a batch may span two epochs."""
        batch = [self._at(self._served + i) for i in range(self._num_prompts)]
        self._served += self._num_prompts
        return batch

    def _at(self, position: int) -> Prompt:
        epoch, offset = divmod(position, len(self._prompts))
        if epoch != self._epoch:
            self._order = list(range(len(self._prompts)))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        return self._prompts[self._order[offset]]

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to go on from here."""
        return {"served": self._served, "seed": self._seed, "size": len(self._prompts)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues where `state` was taken.

        Raises:
            ValueError: the saved run had other prompts or another seed.
        """
        for key, value, option in (
            ("seed", self._seed, "run.seed"),
            ("size", len(self._prompts), "the number of prompts of data.train"),
        ):
            if state[key] != value:
                raise ValueError(
                    f"{option} is {value}, but the checkpoint was written with {state[key]}; "
                    "resume with the same data and seed, or start a new run.dir"
                )
        self._served = state["served"]
