"""Gathers the evidence on a mismatch: collectives over the whole job, and what the replicas' leaders find out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from megatron_rpp.experience.types import ExperienceBatch, Rollout
from megatron_rpp.parallel.collectives import from_replica_leader, gather_objects
from megatron_rpp.parity.answer import find_answer, merged_scores
from megatron_rpp.parity.evidence import Evidence, merged_checks
from megatron_rpp.parity.measure import Mismatch, worst_rows
from megatron_rpp.parity.run_parts import RunParts
from megatron_rpp.parity.temperature import errors, fit_temperature, logprobs_at
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.weight_sync.transport import OutOfStepError, WeightSyncError

_ASLEEP = "the servers were not asked: with rollout.release_memory they sleep while the trainer computes"


def gather_evidence(s: RunParts, batch: ExperienceBatch, rollouts: Sequence[Rollout], mismatch: Mismatch) -> Evidence:
    """The evidence on the responses of all replicas that differ most. A collective over the whole job.

    Args:
        batch: scored; its rows are this replica's `rollouts`.
        mismatch: of the whole job.
    """
    stale, notes = _stale_weights(s)
    chosen = from_replica_leader(s.policy.parallel, lambda: _choose(s, batch))
    worst = picked_rows(batch, chosen)
    fit = fit_temperature(s.config.rollout.temperature, partial(_error_at, s, worst))
    (at_one,) = logprobs_at(worst, s.policy, s.config, [1.0])
    answer = find_answer(s, rollouts, chosen, worst, at_one) if s.policy.parallel.is_replica_leader else None
    answers = [each for each in gather_objects(answer) if each is not None]
    return Evidence(
        mismatch=mismatch,
        stale=stale,
        prompt_ids=merged_checks(each.prompt_ids for each in answers),
        fit=fit,
        servers=merged_scores(answers),
        top_p=s.config.rollout.top_p,
        notes=(*notes, *dict.fromkeys(note for each in answers for note in each.notes)),
    )


def _stale_weights(s: RunParts) -> tuple[tuple[str, ...] | None, list[str]]:
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


def picked_rows(batch: ExperienceBatch, rows: Sequence[int]) -> ExperienceBatch:
    """Those of `rows`, which may be none: a replica has no row where the others' groups were complete first."""
    return batch.rows(torch.tensor(rows, dtype=torch.int64, device=batch.tokens.device))


def _choose(s: RunParts, batch: ExperienceBatch) -> list[int]:
    """This replica's share of parity.responses: rows of `batch`."""
    assert batch.old_logprobs is not None
    share = -(-s.config.parity.responses // s.policy.parallel.dp_size)
    return worst_rows(batch.old_logprobs, batch.rollout_logprobs, batch.loss_mask, share)


def _error_at(s: RunParts, worst: ExperienceBatch, temperatures: Sequence[float]) -> list[float]:
    """Mean |trainer - engine| over all replicas with the trainer at each temperature; the same on every rank."""
    found = logprobs_at(worst, s.policy, s.config, temperatures)
    local = None
    if s.policy.parallel.is_replica_leader:
        local = [*errors(found, worst), float(worst.loss_mask.sum())]
    columns = zip(*(row for row in gather_objects(local) if row is not None), strict=True)
    *sums, tokens = (sum(column) for column in columns)
    return [each / max(tokens, 1.0) for each in sums]
