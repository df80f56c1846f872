"""Scheduled steps of several leaders, as threads of the test, against fake servers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist
from fake_sglang import STOP, FakeServer, Reply, samples_of

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.data.prompt_source import Draw, PromptSource
from megatron_rpp.experience.types import Prompt, Rollout
from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.reward.protocol import Reward
from megatron_rpp.rollout.protocol import RolloutError, SamplingParams
from megatron_rpp.rollout.recorded import RecordedClient
from megatron_rpp.rollout.schedule.quota import Quota
from megatron_rpp.rollout.schedule.scheduler import Leaders, Scheduler
from megatron_rpp.rollout.schedule.settlement import Settlement, settle
from megatron_rpp.rollout.schedule.step import Step
from megatron_rpp.rollout.sglang_client import SGLangClient

SAMPLING = SamplingParams(2, 16, 1.0, 1.0, (STOP,), seed=0)
_STEPS = count()


def prompts(number: int) -> list[Prompt]:
    """The first token of a prompt is its id."""
    return [Prompt(id=i, text="", token_ids=(i, 7), answer="") for i in range(number)]


def quota(groups: int, **changes: Any) -> Quota:
    """Over-sampling by `at_once`; nothing else."""
    settings = {"at_once": groups, "draws": 0, "max_deferrals": 2, "least_groups": 1, "time_s": 0.0, "tokens": 0}
    settings |= changes
    settings["draws"] = settings["draws"] or settings["at_once"]
    return Quota(groups, **settings)


class FakeReward:
    """Rewards by prompt id, in turn for its samples."""

    def __init__(self, of: Callable[[int], Sequence[float]], takes_s: float = 0.0) -> None:
        self.of, self.takes_s, self.calls = of, takes_s, list[int]()  # rollouts in each call
        self.most_at_once = self._at_once = 0  # threads in a call
        self._lock = threading.Lock()

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self.calls.append(len(rollouts))
            time.sleep(self.takes_s)
            return [self.of(rollout.prompt.id)[i % 2] for i, rollout in enumerate(rollouts)]
        finally:
            with self._lock:
                self._at_once -= 1

    def metrics(self) -> Metrics:
        return Metrics()

    def close(self) -> None: ...


def hang_for(server: FakeServer, slow: Callable[[int], bool], seconds: float = 20.0) -> None:
    """Requests for the prompts that are `slow` end after `seconds`, or when they are aborted."""

    def answer(path: str, payload: dict[str, Any]) -> Reply:
        end = time.monotonic() + seconds
        while slow(payload["input_ids"][0][0]) and time.monotonic() < end and not server.is_aborted(payload):
            time.sleep(0.01)
        return 200, samples_of(payload)

    server.answer = answer


class Job:
    """Leaders on one store that run steps as `collect` does, without torch's process groups."""

    def __init__(self, servers: Sequence[FakeServer], leaders: int = 1, **rollout: Any) -> None:
        long = timedelta(seconds=30)
        first = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=long)
        others = [dist.TCPStore("127.0.0.1", first.port, is_master=False, timeout=long) for _ in range(leaders - 1)]
        self.stores = [first, *others]
        self.rollout = RolloutConfig(**rollout)
        self.clients = [SGLangClient([s.url for s in servers], self.rollout, lambda ids: "") for _ in self.stores]
        self.tries = 0  # of all steps
        self.schedulers: list[Scheduler] = []  # of the last step
        self._barrier, self._box = threading.Barrier(leaders), dict[int, Any]()

    def step(self, source: PromptSource, wanted: Quota, reward: Reward | None = None) -> tuple[list[Draw], Settlement]:
        """Sample a step and settle it; (what was drawn, what became of it)."""
        draws, name = source.peek(wanted.draws), str(next(_STEPS))
        wanted = replace(wanted, is_judged=reward is not None)
        step = Step(name, draws, wanted, SAMPLING)
        self.schedulers = [
            Scheduler(step, self.rollout, Leaders(store, self._gather(i), len(self.stores)), reward)
            for i, store in enumerate(self.stores)
        ]
        for _ in range(self.rollout.max_retries + 1):
            self.tries += 1
            with ThreadPoolExecutor(len(self.stores)) as pool:
                found = list(pool.map(self._run, self.schedulers, self.clients))
            if errors := [each for each in found if isinstance(each, RolloutError)]:
                continue
            break
        else:
            raise errors[0]
        self.schedulers[0].forget()
        if reward_errors := [error for _, _, error in found if error is not None]:
            raise reward_errors[0]
        settlement = settle([report for report, _, _ in found], wanted.groups, step.awaited)
        positions = [draw.position for draw in draws[: settlement.drawn]]
        again = (*settlement.surplus, *settlement.unasked)
        source.settle(positions, {positions[i] for i in settlement.deferred}, {positions[i] for i in again})
        return draws, settlement

    def _run(self, scheduler: Scheduler, client: SGLangClient) -> Any:
        try:
            return scheduler.run(RecordedClient(client, None))
        except RolloutError as error:
            return error

    def _gather(self, place: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            self._box[place] = value
            self._barrier.wait(20)
            values = [self._box[i] for i in range(len(self.stores))]
            self._barrier.wait(20)
            return values

        return gather


def kept_ids(draws: Sequence[Draw], settlement: Settlement) -> list[int]:
    return [draws[i].prompt.id for i in settlement.kept]
