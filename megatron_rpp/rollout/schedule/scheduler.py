"""Sampling a step whose prompts are shared out as replicas are free (section `schedule`).

The leaders of all replicas hold the same draw, a list of prompts, and take from it by a counter in the job's store;
a prompt's place in it gives its group_id. Other counters tell them when the step has enough: then nothing but
the groups that must be awaited is begun, and once these have ended each aborts what it has open.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection
from typing import NamedTuple

import torch.distributed as dist

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.parallel.collectives import Gather, portable
from megatron_rpp.reward.protocol import Reward
from megatron_rpp.rollout.payloads import generate_payloads
from megatron_rpp.rollout.protocol import ProgressCallback, RolloutError
from megatron_rpp.rollout.recorded import RecordedClient
from megatron_rpp.rollout.schedule.judge import Judge, RewardFailed
from megatron_rpp.rollout.schedule.quota import Counts
from megatron_rpp.rollout.schedule.sampling_try import Group, SampleIndex, SamplingTry
from megatron_rpp.rollout.schedule.settlement import Report
from megatron_rpp.rollout.schedule.step import Step
from megatron_rpp.rollout.schedule.tally import Tally
from megatron_rpp.rollout.sglang_client import SampleGroup

_POLL_S = 0.1
_LEADERS_PER_POLL = 64  # more of them look at the store less often, to spare it


class Leaders(NamedTuple):
    """How the leaders of the replicas talk to each other."""

    store: dist.Store  # the job's
    gather: Gather  # over them all
    size: int


class Scheduler:
    """One leader's, for one step. `run` once for each try; what is complete stays in `done`, and is not sampled
    again.
    """

    def __init__(
        self,
        step: Step,
        rollout: RolloutConfig,
        leaders: Leaders,
        reward: Reward | None = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        """reward: judges each group as soon as it is complete, where that is wanted.

        Raises ValueError for a prompt that fills rollout.context_length.
        """
        assert step.quota.is_judged == (reward is not None)
        self.done: dict[int, Group] = {}  # index in the draw -> group, of this replica
        self._started: set[int] = set()  # indices that this replica has asked servers for
        self._aborted = 0  # groups, in the last try
        self._step, self._rollout, self._leaders = step, rollout, leaders
        self._reward, self._progress = reward, progress
        self._group_ids = range(step.first_group_id, step.first_group_id + len(step.draws))
        self._payloads = generate_payloads(
            [draw.prompt for draw in step.draws], self._group_ids, step.sampling, rollout.context_length
        )
        self._tallies: list[Tally] = []
        self._with_servers = Stopwatch()  # in the last try

    def run(self, client: RecordedClient) -> tuple[Report, dict[int, Group], Exception | None]:
        """(this replica's part of the step, its groups that may be trained on by index in the draw, what the reward
        raised). Every leader calls it; it returns early where another one fails.

        Raises RolloutError where sampling fails here. An error of the reward is not raised, since it would be the
        same in another try.
        """
        mine = {index: (group.is_kept, group.tokens) for index, group in self.done.items()}
        known = {index: facts for each in self._leaders.gather(mine) for index, facts in each.items()}
        name = f"{self._step.name}/{len(self._tallies)}"
        tally = Tally(self._leaders.store, name, _start(known, self._step.awaited, self._step.tokens_before))
        self._tallies.append(tally)
        reward_error: Exception | None = None
        try:
            asyncio.run(self._run(client, tally, set(known)))
        except RewardFailed as failure:
            reward_error = portable(failure.error)
            tally.fail()
        except BaseException:
            tally.fail()
            raise
        kept = {index: group for index, group in self.done.items() if group.is_kept}
        ends = {index: group.ended_s for index, group in kept.items()}
        skipped = {index: (group.rewards or [0.0])[0] for index, group in self.done.items() if not group.is_kept}
        tokens = sum(group.tokens for group in self.done.values())
        report = Report(ends, skipped, frozenset(self._started), self._aborted, tokens, tuple(client.flights))
        return report, kept, reward_error

    def forget(self) -> None:
        """Take the step's counters out of the store; one leader does, once all others have ended."""
        for tally in self._tallies:
            tally.forget()

    async def _run(self, client: RecordedClient, tally: Tally, known: set[int]) -> None:
        judge = Judge(self._reward) if self._reward is not None else None
        wanted, awaited = set(range(len(self._step.draws))) - known, self._step.awaited
        part = SamplingTry(
            self._step,
            tally,
            sorted(wanted, key=lambda index: (index not in awaited, index)),
            most_open=min(
                self._rollout.max_concurrent_requests, math.ceil(self._step.quota.at_once / self._leaders.size)
            ),
            poll_s=_POLL_S * max(1.0, self._leaders.size / _LEADERS_PER_POLL),
        )
        self._with_servers = Stopwatch()
        try:
            async with client.open(self._step.sampling) as sample:
                await part.run(self._one(sample, judge), self._look)
        finally:
            self.done |= part.done
            self._started |= part.started
            self._aborted = part.aborted
            if judge is not None:
                await judge.close()

    def _one(self, sample: SampleGroup, judge: Judge | None) -> SampleIndex:
        began = time.monotonic()

        async def one(index: int) -> Group:
            with self._with_servers:
                rollouts = await sample(self._step.draws[index].prompt, self._group_ids[index], self._payloads[index])
            rewards = await judge(rollouts) if judge is not None else None
            return Group(rollouts, rewards, time.monotonic() - began)

        return one

    def _look(self, counts: Counts) -> None:
        """Raises RolloutError past the deadline, for which waiting for the judge does not count."""
        groups, limit_s = self._step.quota.groups, self._rollout.request_deadline_s
        if self._progress is not None:
            samples = self._step.sampling.num_samples_per_prompt
            self._progress(min(counts.kept, groups) * samples, groups * samples)
        if self._with_servers.elapsed_s() > limit_s:
            raise RolloutError(
                f"the step has {counts.kept} of {groups} groups after rollout.request_deadline_s={limit_s:g} s; raise "
                "it, or set schedule.time_budget_s"
            )


class Stopwatch:
    """Runs while at least one `with` block on it is open."""

    def __init__(self) -> None:
        self._open, self._since, self._before_s = 0, 0.0, 0.0

    def __enter__(self) -> None:
        if not self._open:
            self._since = time.monotonic()
        self._open += 1

    def __exit__(self, *error: object) -> None:
        self._before_s = self.elapsed_s() if self._open == 1 else self._before_s
        self._open -= 1

    def elapsed_s(self) -> float:
        return self._before_s + (time.monotonic() - self._since if self._open else 0.0)


def _start(known: dict[int, tuple[bool, int]], awaited: Collection[int], tokens_before: int = 0) -> Counts:
    """known: index -> (is it kept, its tokens), of the groups that earlier tries have completed. tokens_before: of
    earlier draws.
    """
    kept = sum(is_kept for is_kept, _ in known.values())
    return Counts(
        kept=kept,
        lost=len(known) - kept,
        awaited=sum(index not in known for index in awaited),
        tokens=tokens_before + sum(tokens for _, tokens in known.values()),
    )
