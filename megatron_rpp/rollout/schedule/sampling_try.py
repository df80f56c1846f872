"""One replica's part in one try at sampling a step: what it takes from the queue, awaits and aborts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rpp.experience.types import Rollout
from megatron_rpp.rollout.schedule.judge import RewardFailed
from megatron_rpp.rollout.schedule.quota import Counts
from megatron_rpp.rollout.schedule.step import Step
from megatron_rpp.rollout.schedule.tally import Tally


@dataclass(frozen=True)
class Group:
    """All responses to one prompt of the draw."""

    rollouts: list[Rollout]
    rewards: list[float] | None  # None where groups are not judged on the way
    ended_s: float  # when it was complete, since the try began that has sampled it

    @property
    def is_kept(self) -> bool:
        """Whether it has something to learn from, as far as is known."""
        return self.rewards is None or any(reward != self.rewards[0] for reward in self.rewards)

    @property
    def tokens(self) -> int:
        return sum(len(rollout.response_ids) for rollout in self.rollouts)


_GRACE = 0.1
"""Of the time that awaited groups took: so much longer may others go on."""

SampleIndex = Callable[[int], Coroutine[Any, Any, Group]]
"""Index in the draw -> its group."""


class SamplingTry:
    """`run` ends where the step has enough, where its queue is empty, or where another replica has failed."""

    def __init__(self, step: Step, tally: Tally, queue: Sequence[int], *, most_open: int, poll_s: float) -> None:
        """queue: indices in the draw, awaited ones first, without what earlier tries have completed."""
        self.done: dict[int, Group] = {}
        self.started: set[int] = set()  # indices that servers were asked for
        self.aborted = 0
        self._step, self._tally, self._queue = step, tally, queue
        self._most_open, self._poll_s = most_open, poll_s
        self._open: dict[asyncio.Task[Group], int] = {}
        self._claim: int | None = None  # a place in the queue that is this replica's, but may not be started yet
        self._is_empty = False  # the queue

    async def run(self, sample: SampleIndex, look: Callable[[Counts], None]) -> None:
        """Raises what `sample` and `look` raise. look: gets the counters now and then."""
        patience = Patience(asyncio.get_running_loop().time)
        try:
            while True:
                counts, has_failed = self._tally.look()
                look(counts)
                elapsed_s = time.monotonic() - self._step.began
                is_met = self._step.quota.is_met(counts, elapsed_s)
                if has_failed:
                    return
                if is_met and (self._step.quota.is_spent(counts, elapsed_s) or patience.is_over(counts.awaited)):
                    self._abort()
                self._fill(sample, counts, is_met)
                if not self._open and (is_met or (self._is_empty and self._claim is None)):
                    return
                await self._wait()
        finally:
            for task in self._open:
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)

    def _abort(self) -> None:
        """Cancel what is open and not awaited, once each."""
        for task, index in self._open.items():
            if index not in self._step.awaited and not task.cancelling():
                task.cancel()

    def _fill(self, sample: SampleIndex, counts: Counts, is_met: bool) -> None:
        """Start groups while they are wanted, and this replica has not too many."""
        known = len(self._step.draws) - len(self._queue)
        while len(self._open) < self._most_open and (claim := self._next()) is not None:
            index = self._queue[claim]
            is_wanted = not is_met and self._step.quota.allows(known + claim, counts)
            if not (is_wanted or index in self._step.awaited):
                return
            self._claim = None
            self.started.add(index)
            self._open[asyncio.create_task(sample(index))] = index

    def _next(self) -> int | None:
        if self._claim is None and not self._is_empty:
            place = self._tally.take()
            self._is_empty = place >= len(self._queue)
            self._claim = None if self._is_empty else place
        return self._claim

    async def _wait(self) -> None:
        """Until something ends. What is complete is counted before an error is raised, one of the reward first."""
        if not self._open:
            await asyncio.sleep(self._poll_s)
            return
        ended, _ = await asyncio.wait(self._open, timeout=self._poll_s, return_when=asyncio.FIRST_COMPLETED)
        errors = []
        for task in ended:
            index = self._open.pop(task)
            if task.cancelled():
                self.aborted += 1
                self._tally.add(lost=1)
            elif error := task.exception():
                errors.append(error)
            else:
                self._count(index, task.result())
        for error in sorted(errors, key=lambda error: not isinstance(error, RewardFailed)):
            raise error

    def _count(self, index: int, group: Group) -> None:
        """Who reads the counters in between must not take the step for over too early: `awaited` goes first."""
        self.done[index] = group
        if index in self._step.awaited:
            self._tally.add(awaited=-1)
        self._tally.add(tokens=group.tokens, **({"kept": 1} if group.is_kept else {"lost": 1}))


class Patience:
    """How long a step that has enough groups lets others go on, while it waits for some and shortly after.

    Those that end need no wait of their own: else every step would wait for the tail of an earlier one. And those that
    are awaited were started first, so that others which sample to the same limit end just after them.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: in seconds; the sampling begins now."""
        self._clock, self._began_s = clock, clock()
        self._has_waited = False
        self._until_s: float | None = None  # where nothing is awaited any more

    def is_over(self, awaited: int) -> bool:
        """awaited: groups that are still waited for by a step that has enough."""
        if awaited:
            self._has_waited = True
            return False
        if self._until_s is None:
            now_s = self._clock()
            self._until_s = now_s + (_GRACE * (now_s - self._began_s) if self._has_waited else 0.0)
        return self._clock() >= self._until_s
