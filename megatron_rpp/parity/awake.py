"""What the search for a cause asks of the servers; before they sleep, where they share the trainer's GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rpp.experience.types import Rollout
from megatron_rpp.parallel.collectives import gather_objects, words_of
from megatron_rpp.parity.answer import Asked, ask_servers
from megatron_rpp.parity.run_parts import RunParts
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.weight_sync.transport import Deadline, OutOfStepError, WeightSyncError


@dataclass(frozen=True)
class AwakeAnswer:
    """What servers said of a step's rollouts before these were scored."""

    stale: tuple[str, ...] | None  # as Evidence's
    notes: tuple[str, ...]  # what prevented the comparison
    picked: tuple[Rollout, ...]  # this replica's that the servers were asked about
    asked: Asked  # of this replica's leader; empty elsewhere


def ask_while_awake(s: RunParts, rollouts: Sequence[Rollout]) -> AwakeAnswer:
    """Of the weights, and of the longest of this replica's `rollouts`. A collective over the whole job.

    Which of them differ most nobody knows yet; over a long one a wrong rope setting shows. The asking takes each
    replica weight_sync.deadline_s at most, and what fails is a note.

    Raises OutOfStepError where ranks are missing.
    """
    stale, notes = stale_weights(s)
    longest = sorted(rollouts, key=lambda r: -len(r.response_ids))
    picked = tuple(longest[: responses_of_a_replica(s)])
    deadline = Deadline("parity", s.config.weight_sync.deadline_s)
    asked = ask_servers(s, picked, deadline) if s.policy.parallel.is_replica_leader else Asked()
    gather_objects(None)  # all have asked: whatever comes next waits for no slow server
    return AwakeAnswer(stale, notes, picked, asked)


def stale_weights(s: RunParts) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """(a line for each server with other weights or None, what prevented the comparison)."""
    if s.config.weight_sync.verify == "off":  # as users set it whose servers' checksums cannot be predicted
        return None, ("weights not compared: weight_sync.verify=off",)
    try:
        return tuple(s.engine.verify_weights()), ()
    except OutOfStepError:
        raise
    except Exception as error:  # whatever it is: a rank that raises here leaves the others in a collective
        return None, (f"weights not compared: {words_of(error, RolloutError, WeightSyncError)}",)


def responses_of_a_replica(s: RunParts) -> int:
    """Its share of parity.responses."""
    return -(-s.config.parity.responses // s.policy.parallel.dp_size)
