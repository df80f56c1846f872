"""When a step has enough responses (section `schedule`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rpp.config.schema import Config
from megatron_rpp.data.prompt_source import Draw


@dataclass(frozen=True)
class Counts:
    """Groups of a step so far, over all replicas. A group is open from when it is taken until it ends."""

    kept: int = 0  # complete, and to be trained on
    lost: int = 0  # complete and left out, or aborted
    awaited: int = 0  # of those that must be awaited: not yet complete
    tokens: int = 0  # response tokens of complete groups, in all draws of the step; nobody knows those of open ones


@dataclass(frozen=True)
class Quota:
    """How many groups a step wants, and what ends its sampling before it has them."""

    groups: int  # to train on
    at_once: int  # open or kept at the same time
    draws: int  # prompts that may be drawn at most
    max_deferrals: int
    least_groups: int  # that a budget waits for
    time_s: float  # 0: no limit
    tokens: int  # 0: no limit
    is_judged: bool = False  # a complete group may turn out to be left out

    def awaited(self, draws: Sequence[Draw]) -> list[int]:
        """Which of `draws` are not aborted: put off too often already, the first `groups` of them."""
        return [i for i, draw in enumerate(draws) if draw.deferrals >= self.max_deferrals][: self.groups]

    def is_met(self, counts: Counts, elapsed_s: float) -> bool:
        """Whether nothing but the awaited groups is worth going on for."""
        sure = counts.kept + (0 if self.is_judged else counts.awaited)
        return sure >= self.groups or self.is_spent(counts, elapsed_s)

    def is_spent(self, counts: Counts, elapsed_s: float) -> bool:
        """Whether a budget ends the step, with the groups that it must have at least."""
        is_late = self.time_s > 0 and elapsed_s >= self.time_s
        return (is_late or 0 < self.tokens <= counts.tokens) and counts.kept >= self.least_groups

    def allows(self, turn: int, counts: Counts) -> bool:
        """Whether the group that is started as the `turn`-th of the step, from 0, may be started by now."""
        return turn < min(self.at_once + counts.lost, self.draws)


def quota_of(config: Config) -> Quota:
    """What `config` asks of every step."""
    schedule, groups = config.schedule, config.rollout.num_prompts
    at_once = math.ceil(round(schedule.over_sampling * groups, 6))  # 1.1 x 10 is 11
    draws = math.ceil(round(schedule.max_draws * groups, 6)) if schedule.dynamic_sampling else at_once
    least = math.ceil(config.train.batch_size / config.algorithm.num_samples_per_prompt)
    return Quota(
        groups,
        at_once,
        draws,
        schedule.max_deferrals,
        least,
        schedule.time_budget_s,
        schedule.token_budget,
        is_judged=schedule.dynamic_sampling,
    )
