"""Watches, at every step, that trainer and engine give the sampled tokens the same log-probs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rpp.config.schema import Config
from megatron_rpp.experience.types import ExperienceBatch, Rollout
from megatron_rpp.parallel.collectives import gather_objects
from megatron_rpp.parity.diagnosis import Diagnosis, diagnose
from megatron_rpp.parity.gather import Scene, gather_evidence
from megatron_rpp.parity.measure import Mismatch, measure, merged
from megatron_rpp.parity.policy import Level, ParityError, corrected, level_of

logger = logging.getLogger(__name__)

LOOK_AGAIN_STEPS = 20
"""A difference that stays at its level is looked into again after so many steps; the search costs time."""


@dataclass(frozen=True)
class Parity:
    """What a step's check leaves."""

    config: Config  # that this step's loss uses
    metrics: dict[str, float]
    diagnosis: Diagnosis | None = None  # where the cause was looked for


class ParityMonitor:
    """`check` each step's scored batch. The same answer on every rank."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._known = Level.FINE  # the level whose cause was looked for last
        self._known_since = 0  # and the step

    def check(self, step: int, batch: ExperienceBatch, rollouts: Sequence[Rollout]) -> Parity:
        """Compare, and above a threshold find the cause and act on it. A collective over the whole job.

        Args:
            batch: scored; its rows are this replica's `rollouts`.

        Raises:
            ParityError: the mean difference is above parity.stop.
        """
        config = self._scene.config
        mismatch = self._measure(batch)
        level = level_of(mismatch, config.parity, config.rollout.top_p)
        is_corrected = level >= Level.CORRECT
        metrics = {**mismatch.metrics(), "mismatch/corrected": float(is_corrected)}
        diagnosis = None
        if self._is_due(step, level):
            diagnosis = diagnose(gather_evidence(self._scene, batch, rollouts, mismatch))
            metrics[f"mismatch/cause_{diagnosis.kind}"] = 1.0
            self._report(step, level, mismatch, diagnosis)
        return Parity(corrected(config) if is_corrected else config, metrics, diagnosis)

    def _measure(self, batch: ExperienceBatch) -> Mismatch:
        """Over all replicas; gathered rather than reduced, so that no two ranks differ in the last digit."""
        assert batch.old_logprobs is not None, "score the batch first"
        local = None
        if self._scene.policy.parallel.is_replica_leader:
            local = measure(batch.old_logprobs, batch.rollout_logprobs, batch.loss_mask, batch.entropy)
        return merged(part for part in gather_objects(local) if part is not None)

    def _is_due(self, step: int, level: Level) -> bool:
        """Whether to look for the cause now; notes that it was."""
        if level == Level.FINE:
            self._known = Level.FINE
            return False
        if level <= self._known and step - self._known_since < LOOK_AGAIN_STEPS:
            return False
        self._known, self._known_since = level, step
        return True

    def _report(self, step: int, level: Level, mismatch: Mismatch, diagnosis: Diagnosis) -> None:
        limits = self._scene.config.parity
        passed = {Level.WARN: limits.warn, Level.CORRECT: limits.correct, Level.STOP: limits.stop}[level]
        words = (
            f"step {step}: trainer and engine differ by {mismatch.mean:.3g} nats a token (largest "
            f"{mismatch.largest:.3g}; surprise above entropy: {mismatch.mean_surprise:.3g}); "
            f"parity.{level.name.lower()}={passed:g}. Cause: {diagnosis}"
        )
        if level == Level.STOP:
            raise ParityError(words)
        action = " This step's loss uses truncated importance weights." if level == Level.CORRECT else ""
        if self._scene.policy.parallel.rank == 0:
            logger.warning("%s%s", words, action)
