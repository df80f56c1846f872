"""Rewards while sampling goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from megatron_rpp.experience.types import Rollout
from megatron_rpp.reward.protocol import Reward


class RewardFailed(Exception):
    """The reward raised."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Judge:
    """Scores groups in a thread, one call at a time: what comes meanwhile goes into the next call together.

    So a reward is never called by two threads, and its limits for a call hold for many groups at once.
    """

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self._waiting: list[tuple[Sequence[Rollout], asyncio.Future[list[float]]]] = []
        self._working: asyncio.Task[None] | None = None

    async def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One reward a rollout. Raises RewardFailed."""
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._waiting.append((rollouts, future))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await future

    async def close(self) -> None:
        """Wait for the call that is under way; what waits for the next one is dropped."""
        self._waiting.clear()
        if self._working is not None:
            await asyncio.wait([self._working])

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            rollouts = [rollout for each, _ in batch for rollout in each]
            try:
                rewards = await asyncio.to_thread(self._reward, rollouts)
                if len(rewards) != len(rollouts):
                    raise ValueError(f"{len(rewards)} rewards for {len(rollouts)} responses")
            except Exception as error:  # whatever it is, it is raised as it is where the step is collected
                _answer_all(batch, error)
                continue
            place = 0
            for each, future in batch:
                if not future.done():  # cancelled
                    future.set_result(rewards[place : place + len(each)])
                place += len(each)


def _answer_all(batch: Sequence[tuple[Sequence[Rollout], asyncio.Future[list[float]]]], error: Exception) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(RewardFailed(error))
