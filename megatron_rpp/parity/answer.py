"""What one replica's leader finds out by itself: its servers' own log-probs, and the prompt ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from megatron_rpp.experience.types import ExperienceBatch, Rollout
from megatron_rpp.parity.evidence import PromptIdsCheck, Rescored, added
from megatron_rpp.parity.prompt_ids import check_prompt_ids
from megatron_rpp.parity.rescore import Scored, assign, rescore, share_of, shortened
from megatron_rpp.parity.run_parts import RunParts
from megatron_rpp.rollout.http import post_json

T = TypeVar("T")
Scores = dict[str, Rescored]
"""By URL."""


@dataclass(frozen=True)
class Answer:
    """Of one replica."""

    scores: Scores
    prompt_ids: PromptIdsCheck
    notes: tuple[str, ...]  # what failed


def find_answer(
    s: RunParts, rollouts: Sequence[Rollout], chosen: Sequence[int], worst: ExperienceBatch, at_one: Tensor
) -> Answer:
    """Ask the servers for their log-probs of the `chosen` of `rollouts`. Never raises: other ranks wait for it.

    Args:
        worst: the scored rows `chosen`.
        at_one: [len(chosen), S], the trainer's log-probs of them at temperature 1.
    """
    nothing: tuple[Scores, list[str]] = ({}, [])
    picked = [rollouts[i] for i in chosen]
    (scores, failed), broken = _tried("not scored again", lambda: _ask_servers(s, picked, worst, at_one), nothing)
    prompt_ids, unchecked = _tried(
        "prompt ids not compared",
        lambda: check_prompt_ids(rollouts, chosen, s.tokenizer, chat=s.config.data.chat_template),
        PromptIdsCheck(),
    )
    return Answer(scores, prompt_ids, (*failed, *broken, *unchecked))


def merged_scores(answers: Iterable[Answer]) -> Scores:
    """Of all replicas together, without servers that were given no tokens."""
    total: Scores = {}
    for answer in answers:
        for url, part in answer.scores.items():
            total[url] = added(total.get(url, Rescored()), part)
    return {url: each for url, each in total.items() if each.tokens}


def _tried(what: str, compute: Callable[[], T], instead: T) -> tuple[T, list[str]]:
    """(the result or `instead`, a note where it failed)."""
    try:
        return compute(), []
    except Exception as error:  # whatever it is: a rank that raises here leaves the others in a collective
        return instead, [f"{what}: {type(error).__name__}: {error}"]


def _ask_servers(
    s: RunParts, picked: Sequence[Rollout], worst: ExperienceBatch, at_one: Tensor
) -> tuple[Scores, list[str]]:
    """(the scores of this replica's share of the servers, a line for each that failed)."""
    if s.config.rollout.release_memory:
        return {}, []
    assert worst.old_logprobs is not None
    urls = share_of(s.client.urls, s.policy.parallel.dp_rank, s.policy.parallel.dp_size)
    room = s.config.rollout.context_length
    items = [shortened(row, r.prompt.token_ids, r.response_ids, room) for row, r in enumerate(picked)]
    scored, failed = rescore(post_json, assign(items, urls), s.config.rollout.request_deadline_s)
    ours, recorded = at_one.double().cpu(), (worst.old_logprobs - worst.rollout_logprobs).double().abs().cpu()
    return {url: _compared(pairs, ours, recorded) for url, pairs in scored.items()}, failed


def _compared(pairs: Sequence[Scored], at_one: Tensor, recorded: Tensor) -> Rescored:
    """One server's log-probs against the trainer's `at_one` [rows, S], and `recorded` [rows, S] of the same tokens."""
    total = Rescored()
    for item, found in pairs:
        tokens = slice(item.start, len(item.ids))
        off = (at_one[item.row, tokens] - at_one.new_tensor(found)).abs().sum()
        total = added(total, Rescored(float(off), float(recorded[item.row, tokens].sum()), float(len(found))))
    return total
