"""What one replica's leader finds out by itself: its servers' own log-probs, and the prompt ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from megatron_rpp.experience.types import ExperienceBatch, Rollout
from megatron_rpp.parity.evidence import PromptIdsCheck, Rescored, added
from megatron_rpp.parity.prompt_ids import check_prompt_ids
from megatron_rpp.parity.rescore import Scored, assign, rescore, share_of, shortened
from megatron_rpp.parity.run_parts import RunParts
from megatron_rpp.rollout.http import post_json
from megatron_rpp.weight_sync.transport import Deadline

T = TypeVar("T")
Scores = dict[str, Rescored]
"""By URL."""


@dataclass(frozen=True)
class Asked:
    """The servers' log-probs of some rollouts, the rows of the items."""

    scored: Mapping[str, Sequence[Scored]] = field(default_factory=dict)  # by URL
    notes: tuple[str, ...] = ()  # what failed


@dataclass(frozen=True)
class Answer:
    """Of one replica."""

    scores: Scores
    prompt_ids: PromptIdsCheck
    notes: tuple[str, ...]  # what failed


def find_answer(
    s: RunParts,
    rollouts: Sequence[Rollout],
    picked: Sequence[Rollout],
    asked: Asked | None,
    worst: ExperienceBatch,
    at_one: Tensor,
) -> Answer:
    """The servers' log-probs of `picked` against the trainer's. Never raises: other ranks wait for it.

    Args:
        rollouts: all of this replica, of which prompt ids are compared.
        asked: what the servers said of `picked`; None: they are asked, unless they sleep.
        worst: the scored rows of `picked`.
        at_one: [len(picked), S], the trainer's log-probs of them at temperature 1.
    """
    if asked is None:
        deadline = Deadline("parity", s.config.rollout.request_deadline_s)
        asked = Asked() if s.config.rollout.release_memory else ask_servers(s, picked, deadline)
    nothing: Scores = {}
    scores, broken = _tried("not scored again", lambda: _scores(asked, worst, at_one), nothing)
    prompt_ids, unchecked = _tried(
        "prompt ids not compared",
        lambda: check_prompt_ids(rollouts, picked, s.tokenizer, chat=s.config.data.chat_template),
        PromptIdsCheck(),
    )
    return Answer(scores, prompt_ids, (*asked.notes, *broken, *unchecked))


def ask_servers(s: RunParts, picked: Sequence[Rollout], deadline: Deadline) -> Asked:
    """This replica's share of the servers for their log-probs of `picked`. Never raises: other ranks wait for it."""
    nothing: tuple[dict[str, list[Scored]], list[str]] = ({}, [])
    (scored, failed), broken = _tried("not scored again", lambda: _rescored(s, picked, deadline), nothing)
    return Asked(scored, (*failed, *broken))


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


def _rescored(s: RunParts, picked: Sequence[Rollout], deadline: Deadline) -> tuple[dict[str, list[Scored]], list[str]]:
    """(what this replica's share of the servers said, by URL; a line for each that failed)."""
    urls = share_of(s.client.urls, s.policy.parallel.dp_rank, s.policy.parallel.dp_size)
    room = s.config.rollout.context_length
    items = [shortened(row, r.prompt.token_ids, r.response_ids, room) for row, r in enumerate(picked)]
    return rescore(post_json, assign(items, urls), deadline)


def _scores(asked: Asked, worst: ExperienceBatch, at_one: Tensor) -> Scores:
    assert worst.old_logprobs is not None
    ours, recorded = at_one.double().cpu(), (worst.old_logprobs - worst.rollout_logprobs).double().abs().cpu()
    return {url: _compared(pairs, ours, recorded) for url, pairs in asked.scored.items()}


def _compared(pairs: Sequence[Scored], at_one: Tensor, recorded: Tensor) -> Rescored:
    """One server's log-probs against the trainer's `at_one` [rows, S], and `recorded` [rows, S] of the same tokens."""
    total = Rescored()
    for item, found in pairs:
        tokens = slice(item.start, len(item.ids))
        off = (at_one[item.row, tokens] - at_one.new_tensor(found)).abs().sum()
        total = added(total, Rescored(float(off), float(recorded[item.row, tokens].sum()), float(len(found))))
    return total
