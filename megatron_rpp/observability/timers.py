"""Wall-clock seconds of the parts of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timers:
    """`with timers("rollout"): ...` adds to time/rollout; parts that run more than once add up."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block, also when it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self.seconds(name) + time.perf_counter() - start

    def seconds(self, name: str) -> float:
        """Seconds so far in this step; 0 where the part has not run."""
        return self._seconds.get(name, 0.0)

    def as_metrics(self) -> dict[str, float]:
        """{"time/rollout": seconds, ...}; the timers start again from nothing."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{name}": value for name, value in seconds.items()}
