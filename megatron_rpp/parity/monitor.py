"""Watches, at every step, that trainer and engine give the sampled tokens the same log-probs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rpp.config.schema import Config, ParityConfig
from megatron_rpp.experience.types import ExperienceBatch, Rollout
from megatron_rpp.parallel.collectives import gather_objects
from megatron_rpp.parity.awake import AwakeAnswer, ask_while_awake
from megatron_rpp.parity.diagnosis import Diagnosis, diagnose
from megatron_rpp.parity.gather import gather_evidence
from megatron_rpp.parity.measure import Mismatch, measure, merged
from megatron_rpp.parity.policy import Level, ParityError, corrected, level_of
from megatron_rpp.parity.run_parts import RunParts

logger = logging.getLogger(__name__)

LOOK_AGAIN_STEPS = 20
"""A difference that has been looked into is looked into again after so many steps: a search costs time."""
RISES = 2.0
"""Within them one that is above so many times the mean last looked into is another, and due at once."""


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
        self._known_mean = 0.0  # and its mean difference
        self._is_owed = False  # the servers slept in the last search: they are asked before they sleep again
        self._awake: AwakeAnswer | None = None  # what they said, for this step's check

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs to look for causes at the same steps as if the run had not stopped."""
        known, since, owed = int(self._known), self._known_since, int(self._is_owed)
        return {"known": known, "since": since, "mean": self._known_mean, "owed": owed}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state`; from nothing where it is empty."""
        if state:
            self._known, self._known_since = Level(int(state["known"])), int(state["since"])
            self._known_mean, self._is_owed = state.get("mean", 0.0), bool(state.get("owed", 0))

    def ask_while_awake(self, rollouts: Sequence[Rollout]) -> None:
        """Before servers give their memory back: what the last search could not ask them. A collective, as `check`.

        rollouts: this replica's of the step, in any order.
        """
        if self._is_owed:
            self._is_owed, self._awake = False, ask_while_awake(self._parts, rollouts)

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
        diagnosis, awake = None, self._awake
        self._awake = None
        if self._is_due(step, level, mismatch.mean, has_asked=awake is not None):
            diagnosis = diagnose(gather_evidence(self._parts, batch, rollouts, mismatch, awake))
            self._is_owed = config.rollout.release_memory and awake is None
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

    def _is_due(self, step: int, level: Level, mean: float, *, has_asked: bool) -> bool:
        """Whether to look for the cause now; notes that it was. has_asked: servers, for the search of the last step."""
        is_known = level <= self._known and step - self._known_since < LOOK_AGAIN_STEPS
        if level == Level.FINE or (is_known and not self._has_risen(mean) and not has_asked):
            return False
        self._known, self._known_since, self._known_mean = level, step, mean
        return True

    def _has_risen(self, mean: float) -> bool:
        """Only a difference above parity.warn by itself; NaN has risen from all but NaN."""
        is_above = not mean <= max(self._parts.config.parity.warn, RISES * self._known_mean)
        return is_above and not math.isnan(self._known_mean)

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
