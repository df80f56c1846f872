"""Worker processes that score answers within hard limits of time and memory."""

from __future__ import annotations

import math
import selectors
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.reward.workers.fork_server import ForkServer
from megatron_rpp.reward.workers.scoring_worker import Failure, ScoringWorker, ask_in_words

PATIENCE_S = 0.5  # or a tenth of the limit: whoever takes longer waits until all others have had their turn


@dataclass(frozen=True)
class Limits:
    """What verifying may cost."""

    time_s: float  # of a processor, for an answer
    batch_time_s: float  # by the clock, for a call
    memory_mb: int  # of a worker, beyond what it is forked with
    workers: int

    @staticmethod
    def of(config: RewardConfig) -> Limits:
        return Limits(config.time_limit_s, config.batch_time_limit_s, config.memory_limit_mb, config.workers)

    @property
    def patience_s(self) -> float:
        """Of the first try of an answer."""
        return min(self.time_s, max(PATIENCE_S, self.time_s / 10))


class WorkerPool:
    """Scores answers in processes that live as long as a call; their parent starts at first use and stays."""

    def __init__(
        self,
        scorer: str,
        limits: Limits,
        *,
        given_up: float = 0.0,
        most: float = 1.0,
        beside: WorkerPool | None = None,
        **arguments: Any,
    ) -> None:
        """scorer: path of its maker, which gets `arguments`. given_up: score at a limit. most: above, else cut off.
        beside: a pool of the same scorer, whose parent process is this one's, too."""
        self._limits, self._given_up, self._most = limits, given_up, most
        self._server: ForkServer = ForkServer(scorer, arguments) if beside is None else beside._server
        self._lock = self._server.lock
        self._metrics = _no_failures()

    @property
    def is_running(self) -> bool:
        """Whether a process has been started, and has not ended."""
        return self._server.is_running

    def score(self, items: Sequence[tuple[str, Any]]) -> list[float]:
        """One score for each item, from 0 to `most`; `given_up` where it hit a limit or broke its worker twice.

        Raises:
            RuntimeError: a worker does not start, for want of a package for instance.
        """
        return [self._given_up if score is None else score for score in self.try_score(items)]

    def try_score(self, items: Sequence[tuple[str, Any]]) -> list[float | None]:
        """As `score`, with None for those that were given up."""
        if not items:
            return []
        with self._lock:
            call = _Call(items, self._limits, self._server)
            try:
                call.run()
            finally:
                call.close()
            self._metrics.add_sum("reward/timeouts", call.failures[Failure.TIME])
            self._metrics.add_sum("reward/broken", call.failures[Failure.BROKEN])
            return [None if score is None else self._within(score) for score in call.scores]

    def start(self) -> None:
        """Starts the parent now, so that what keeps it from starting is said now. Raises RuntimeError."""
        with self._lock:
            self._server.start()

    def score_together(self, data: Any, limit_s: float) -> str | Failure:
        """What the scorer says in words to ("", data), in a worker by itself; a Failure is not counted."""
        with self._lock:
            return ask_in_words(self._server, data, limit_s, self._limits.memory_mb << 20)

    def metrics(self) -> Metrics:
        """reward/timeouts and reward/broken since they were last asked for."""
        with self._lock:
            taken, self._metrics = self._metrics, _no_failures()
        return taken

    def close(self) -> None:
        """Ends the processes; a later `score` starts new ones."""
        self._server.close()

    def _within(self, score: float) -> float:
        return score if math.isinf(self._most) else min(max(score, 0.0), self._most)


def _no_failures() -> Metrics:
    metrics = Metrics()
    metrics.add_sum("reward/timeouts", 0.0)
    metrics.add_sum("reward/broken", 0.0)
    return metrics


class _Call:
    """The items of one call on their way through the workers.

    An answer has two tries: one with little patience, and one with the whole limit once no answer waits for
    its first. So those that hang cannot keep the others from being scored within the call's limit, and an
    answer does not pay for what its predecessor did to the worker. A try in which the parent died (the kernel
    ends the largest process where memory is short) does not count, once for each answer.
    """

    def __init__(self, items: Sequence[tuple[str, Any]], limits: Limits, server: ForkServer) -> None:
        self.scores: list[float | None] = [None] * len(items)  # None: given up
        self.failures = {Failure.TIME: 0, Failure.BROKEN: 0}
        self._items, self._limits, self._server = items, limits, server
        self._first, self._second = deque(range(len(items))), deque[int]()
        self._orphaned = set[int]()  # items whose worker's parent died
        self._selector = selectors.DefaultSelector()
        self._busy: set[ScoringWorker] = set()
        self._idle: list[ScoringWorker] = []

    def run(self) -> None:
        """Until all items are scored or the call's time is over."""
        self._add_worker()  # the first start is not counted
        deadline = time.monotonic() + self._limits.batch_time_s
        while self._first or self._second or self._busy:
            self._hand_out()
            now = time.monotonic()
            next_s = min([deadline, *(worker.deadline for worker in self._busy)]) - now
            for key, _ in self._selector.select(max(0.0, next_s)):
                self._settle(key.data)
            now = time.monotonic()
            for worker in [worker for worker in self._busy if worker.deadline <= now]:
                self._fail(worker, Failure.TIME)
            if now >= deadline:
                self.failures[Failure.TIME] += len(self._first) + len(self._second) + len(self._busy)
                return

    def close(self) -> None:
        """Ends this call's workers."""
        for worker in [*self._busy, *self._idle]:
            self._server.kill(worker.process)
        self._selector.close()

    def _hand_out(self) -> None:
        """Each free worker gets an item."""
        while self._first or self._second:
            if not self._idle:
                if len(self._busy) >= min(self._limits.workers, len(self._items)):
                    return
                self._add_worker()
            worker = self._idle.pop()
            is_first = bool(self._first)
            number = (self._first or self._second).popleft()
            worker.is_first_try = is_first
            self._busy.add(worker)
            self._selector.register(worker.process.channel, selectors.EVENT_READ, worker)
            limit_s = self._limits.patience_s if is_first else self._limits.time_s
            if not worker.ask(number, self._items[number], limit_s):
                self._fail(worker, Failure.BROKEN)

    def _settle(self, worker: ScoringWorker) -> None:
        """Takes what the worker has to say."""
        answer = worker.read()
        if isinstance(answer, Failure):
            self._fail(worker, answer)
        elif answer is not None:
            self.scores[worker.number] = answer
            self._release(worker)
            if worker.is_worn:
                self._server.kill(worker.process)
            else:
                self._idle.append(worker)

    def _fail(self, worker: ScoringWorker, failure: Failure) -> None:
        self._release(worker)
        number, ended_by = worker.number, self._server.kill(worker.process)
        if ended_by is None and number not in self._orphaned:
            self._orphaned.add(number)
            (self._first if worker.is_first_try else self._second).appendleft(number)
            return
        if ended_by == signal.SIGPROF:
            failure = Failure.TIME
        if worker.is_first_try and not (failure is Failure.TIME and self._limits.patience_s == self._limits.time_s):
            self._second.append(number)
        else:
            self.failures[failure] += 1

    def _release(self, worker: ScoringWorker) -> None:
        self._selector.unregister(worker.process.channel)
        self._busy.remove(worker)

    def _add_worker(self) -> None:
        self._idle.append(ScoringWorker(self._server.fork(self._limits.memory_mb << 20)))
