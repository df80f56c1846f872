"""Watches, at every step, that trainer and engine give the sampled tokens the same log-probs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rpp.config.schema import Config, ParityConfig
from megatron_rpp.experience.types import ExperienceBatch, Rollout
from megatron_rpp.parallel.collectives import gather_objects
from megatron_rpp.parity.diagnosis import Diagnosis, diagnose
from megatron_rpp.parity.gather import gather_evidence
from megatron_rpp.parity.measure import Mismatch, measure, merged
from megatron_rpp.parity.policy import Level, ParityError, corrected, level_of
from megatron_rpp.parity.run_parts import RunParts

logger = logging.getLogger(__name__)

LOOK_AGAIN_STEPS = 20
"""A difference at or below the level last looked into is looked into again after so many steps: a search costs time."""


@dataclass(frozen=True)
class Parity:
    """What a step's check leaves."""

    config: Config  # that this step's loss uses
    metrics: dict[str, float]
    diagnosis: Diagnosis | None = None  # where the cause was looked for


class ParityMonitor:
    """`check` each step's scored batch. The same answer on every rank."""

    def __init__(self, parts: RunParts) -> None:
        self._parts = parts
        self._known = Level.FINE  # the level whose cause was looked for last
        self._known_since = 0  # and the step

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to look for causes at the same steps as if the run had not stopped."""
        return {"known": int(self._known), "since": self._known_since}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from `state`; from nothing where it is empty."""
        if state:
            self._known, self._known_since = Level(state["known"]), state["since"]

    def check(self, step: int, batch: ExperienceBatch, rollouts: Sequence[Rollout]) -> Parity:
        """Compare, and above a threshold find the cause and act on it. A collective over the whole job.

        Args:
            batch: scored; its rows are this replica's `rollouts`.

        Raises:
            ParityError: the mean difference is above parity.stop.
        """
        config = self._parts.config
        mismatch = self._measure(batch)
        level = level_of(mismatch, config.parity, config.rollout.top_p)
        is_corrected = level >= Level.CORRECT
        metrics = {**mismatch.metrics(), "mismatch/corrected": float(is_corrected)}
        diagnosis = None
        if self._is_due(step, level):
            diagnosis = diagnose(gather_evidence(self._parts, batch, rollouts, mismatch))
            metrics[f"mismatch/cause_{diagnosis.kind}"] = 1.0
            self._report(step, level, mismatch, diagnosis)
        return Parity(corrected(config) if is_corrected else config, metrics, diagnosis)

    def _measure(self, batch: ExperienceBatch) -> Mismatch:
        """Over all replicas; gathered rather than reduced, so that no two ranks differ in the last digit."""
        assert batch.old_logprobs is not None, "score the batch first"
        local = None
        if self._parts.policy.parallel.is_replica_leader:
            local = measure(batch.old_logprobs, batch.rollout_logprobs, batch.loss_mask, batch.entropy)
        return merged(part for part in gather_objects(local) if part is not None)

    def _is_due(self, step: int, level: Level) -> bool:
        """Whether to look for the cause now; notes that it was."""
        is_known = level <= self._known and step - self._known_since < LOOK_AGAIN_STEPS
        if level == Level.FINE or is_known:
            return False
        self._known, self._known_since = level, step
        return True

    def _report(self, step: int, level: Level, mismatch: Mismatch, diagnosis: Diagnosis) -> None:
        words = f"step {step}: {_what_passed(self._parts.config.parity, level, mismatch)}. Cause: {diagnosis}"
        if level == Level.STOP:
            raise ParityError(words)
        action = " This step's loss uses truncated importance weights." if level == Level.CORRECT else ""
        if self._parts.policy.parallel.rank == 0:
            logger.warning("%s%s", words, action)


def _what_passed(limits: ParityConfig, level: Level, mismatch: Mismatch) -> str:
    """The number that is above its threshold, and the other one."""
    limit = {Level.WARN: limits.warn, Level.CORRECT: limits.correct, Level.STOP: limits.stop}[level]
    name = f"parity.{level.name.lower()}={limit:g}"
    mean, surprisal = f"{mismatch.mean:.3g}", f"{mismatch.mean_surprise:.3g}"
    if mismatch.mean <= limit:
        return (
            f"the engine's tokens have a mean surprisal of {surprisal} nats above the entropy, where 0 is expected; "
            f"that is beyond {name}, though their log-probs differ by {mean} only"
        )
    return (
        f"trainer and engine differ by {mean} nats a token, above {name} (largest {mismatch.largest:.3g}; mean "
        f"surprisal above entropy {surprisal})"
    )
