"""Gathers the evidence on a mismatch: collectives over the whole job, and the servers' own log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from megatron_rpp.config.schema import Config
from megatron_rpp.data.tokenizer import Tokenizer
from megatron_rpp.experience.types import ExperienceBatch, Rollout
from megatron_rpp.model.build import Model
from megatron_rpp.parallel.collectives import from_replica_leader, gather_objects
from megatron_rpp.parity.context import check_context
from megatron_rpp.parity.evidence import ContextCheck, Evidence, Rescored, merged_checks
from megatron_rpp.parity.measure import Mismatch, worst_rows
from megatron_rpp.parity.rescore import Scored, assign, rescore, shortened
from megatron_rpp.parity.temperature import errors, fit_temperature, logprobs_at
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.weight_sync.transport import OutOfStepError, WeightSyncError

_ASLEEP = "the servers were not asked: with rollout.release_memory they sleep while the trainer computes"


class WeightVerifier(Protocol):
    """`SyncedRolloutEngine`."""

    def verify_weights(self) -> list[str]:
        """A line for each server whose tensors are not the trainer's. A collective over the whole job."""
        ...


class Servers(Protocol):
    """`SGLangClient`."""

    urls: tuple[str, ...]

    def post(self, url: str, endpoint: str, payload: dict[str, object], timeout_s: float) -> dict[str, object]: ...


@dataclass(frozen=True)
class Scene:
    """The parts of a run that the search for a cause asks."""

    config: Config
    policy: Model
    engine: WeightVerifier
    servers: Servers
    tokenizer: Tokenizer


def gather_evidence(s: Scene, batch: ExperienceBatch, rollouts: Sequence[Rollout], mismatch: Mismatch) -> Evidence:
    """The evidence on the responses of all replicas that differ most. A collective over the whole job."""
    stale, notes = _stale_weights(s)
    chosen = from_replica_leader(s.policy.parallel, lambda: _choose(s, batch))
    worst = batch.rows(torch.tensor(chosen, device=batch.tokens.device))
    fit = fit_temperature(s.config.rollout.temperature, partial(_error_at, s, worst))
    (at_one,) = logprobs_at(worst, s.policy, s.config, [1.0])
    answer = _ask(s, rollouts, chosen, at_one) if s.policy.parallel.is_replica_leader else None
    answers = [each for each in gather_objects(answer) if each is not None]
    correlation, slope = mismatch.growth()
    return Evidence(
        mean=mismatch.mean,
        correlation=correlation,
        slope=slope,
        stale=stale,
        context=merged_checks(each.context for each in answers),
        fit=fit,
        servers=_merged_scores(answers),
        bias=mismatch.bias(),
        top_p=s.config.rollout.top_p,
        notes=(*notes, *dict.fromkeys(note for each in answers for note in each.failed)),
    )


@dataclass(frozen=True)
class _Answer:
    """What one replica's leader found out."""

    scores: dict[str, Rescored]
    failed: list[str]
    context: ContextCheck


def _stale_weights(s: Scene) -> tuple[tuple[str, ...] | None, list[str]]:
    """(a line for each server with other weights or None, what prevented the comparison)."""
    if s.config.rollout.release_memory:
        return None, [_ASLEEP]
    if s.config.weight_sync.verify == "off":  # as users set it whose servers' checksums cannot be predicted
        return None, ["weights not compared: weight_sync.verify=off"]
    try:
        return tuple(s.engine.verify_weights()), []
    except OutOfStepError:
        raise
    except (RolloutError, WeightSyncError) as error:  # raised on every rank
        return None, [f"weights not compared: {error}"]


def _choose(s: Scene, batch: ExperienceBatch) -> list[int]:
    """This replica's share of parity.responses: rows of `batch`."""
    assert batch.old_logprobs is not None
    share = -(-s.config.parity.responses // s.policy.parallel.dp_size)
    return worst_rows(batch.old_logprobs, batch.rollout_logprobs, batch.loss_mask, share)


def _error_at(s: Scene, worst: ExperienceBatch, temperatures: Sequence[float]) -> list[float]:
    """Mean |trainer - engine| over all replicas with the trainer at each temperature; the same on every rank."""
    found = logprobs_at(worst, s.policy, s.config, temperatures)
    local = None
    if s.policy.parallel.is_replica_leader:
        local = [*errors(found, worst), float(worst.loss_mask.sum())]
    columns = zip(*(row for row in gather_objects(local) if row is not None), strict=True)
    *sums, tokens = (sum(column) for column in columns)
    return [each / max(tokens, 1.0) for each in sums]


def _ask(s: Scene, rollouts: Sequence[Rollout], chosen: Sequence[int], at_one: torch.Tensor) -> _Answer:
    """The servers' own log-probs of the `chosen` responses, against the trainer's `at_one` [len(chosen), S]."""
    context_length = s.config.rollout.context_length
    picked = [rollouts[i] for i in chosen]
    items = [shortened(i, r.prompt.token_ids, r.response_ids, context_length) for i, r in enumerate(picked)]
    given = {} if s.config.rollout.release_memory else assign(items, s.servers.urls)
    scored, failed = rescore(s.servers.post, given, s.config.rollout.request_deadline_s)
    scores = {url: _compared(pairs, at_one.double().cpu()) for url, pairs in scored.items()}
    return _Answer(scores, failed, check_context(rollouts, chosen, s.tokenizer, chat=s.config.data.chat_template))


def _compared(pairs: Sequence[Scored], at_one: torch.Tensor) -> Rescored:
    """One server's log-probs against the trainer's `at_one` [rows, S]."""
    d = 0.0
    for item, found in pairs:
        trainer = at_one[item.row, item.start : len(item.ids)]
        d += float((trainer - torch.tensor(found, dtype=torch.float64)).abs().sum())
    return Rescored(d, float(sum(len(found) for _, found in pairs)))


def _merged_scores(answers: Sequence[_Answer]) -> dict[str, Rescored]:
    total: dict[str, Rescored] = {}
    for answer in answers:
        for url, part in answer.scores.items():
            known = total.get(url, Rescored(0.0, 0.0))
            total[url] = Rescored(known.d + part.d, known.tokens + part.tokens)
    return {url: each for url, each in total.items() if each.tokens}
