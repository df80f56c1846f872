"""Gathers the evidence on a mismatch: collectives over the whole job, and what the replicas' leaders find out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from megatron_rpp.experience.collate import collate
from megatron_rpp.experience.types import ExperienceBatch, Rollout
from megatron_rpp.parallel.collectives import from_replica_leader, gather_objects
from megatron_rpp.parity.answer import find_answer, merged_scores
from megatron_rpp.parity.awake import AwakeAnswer, responses_of_a_replica, stale_weights
from megatron_rpp.parity.evidence import Evidence, merged_checks
from megatron_rpp.parity.measure import Mismatch, worst_rows
from megatron_rpp.parity.run_parts import RunParts
from megatron_rpp.parity.temperature import errors, fit_temperature, logprobs_at

_ASLEEP = (
    "the servers were not asked: with rollout.release_memory they sleep now; they will be before they sleep again, if "
    "the next step differs, too"
)


def gather_evidence(
    s: RunParts,
    batch: ExperienceBatch,
    rollouts: Sequence[Rollout],
    mismatch: Mismatch,
    awake: AwakeAnswer | None = None,
) -> Evidence:
    """The evidence on the responses of all replicas that differ most. A collective over the whole job.

    Args:
        batch: scored; its rows are this replica's `rollouts`.
        mismatch: of the whole job.
        awake: what servers that sleep now said before, of other rollouts, which are looked at instead.
    """
    if awake is None:
        stale, notes = (None, (_ASLEEP,)) if s.config.rollout.release_memory else stale_weights(s)
        chosen = from_replica_leader(s.policy.parallel, lambda: _choose(s, batch))
        picked, worst = tuple(rollouts[i] for i in chosen), picked_rows(batch, chosen)
    else:
        stale, notes, picked = awake.stale, awake.notes, awake.picked
        worst = _scored(s, picked)
    fit = fit_temperature(s.config.rollout.temperature, partial(_error_at, s, worst))
    (at_one,) = logprobs_at(worst, s.policy, s.config, [1.0])
    is_leader, asked = s.policy.parallel.is_replica_leader, awake.asked if awake is not None else None
    answer = find_answer(s, rollouts, picked, asked, worst, at_one) if is_leader else None
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


def picked_rows(batch: ExperienceBatch, rows: Sequence[int]) -> ExperienceBatch:
    """Those of `rows`, which may be none: a replica has no row where the others' groups were complete first."""
    return batch.rows(torch.tensor(rows, dtype=torch.int64, device=batch.tokens.device))


def _choose(s: RunParts, batch: ExperienceBatch) -> list[int]:
    """This replica's share of parity.responses: rows of `batch`."""
    assert batch.old_logprobs is not None
    return worst_rows(batch.old_logprobs, batch.rollout_logprobs, batch.loss_mask, responses_of_a_replica(s))


def _scored(s: RunParts, rollouts: Sequence[Rollout]) -> ExperienceBatch:
    """A batch of `rollouts`, which may be none, with the trainer's log-probs. A collective over the whole job."""
    device = s.policy.parallel.device
    batch = collate(rollouts, [0.0] * len(rollouts), pad_token_id=s.tokenizer.pad_token_id, device=device)
    (old_logprobs,) = logprobs_at(batch, s.policy, s.config, [s.config.rollout.temperature])
    return replace(batch, old_logprobs=old_logprobs)


def _error_at(s: RunParts, worst: ExperienceBatch, temperatures: Sequence[float]) -> list[float]:
    """Mean |trainer - engine| over all replicas with the trainer at each temperature; the same on every rank."""
    found = logprobs_at(worst, s.policy, s.config, temperatures)
    local = None
    if s.policy.parallel.is_replica_leader:
        local = [*errors(found, worst), float(worst.loss_mask.sum())]
    columns = zip(*(row for row in gather_objects(local) if row is not None), strict=True)
    *sums, tokens = (sum(column) for column in columns)
    return [each / max(tokens, 1.0) for each in sums]
