"""GPU memory of the parts of a step, as torch's allocator counts it: the most at once, and what is left behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from megatron_rpp.device.memory import MemoryUse, forget_peak, memory_use
from megatron_rpp.observability.metrics import Metrics

PEAK, HELD = "memory/peak_gib/", "memory/allocated_gib/"
GIB = 2**30


class PhaseMemory:
    """`with phase_memory("score"): ...` notes the peak inside, and what is held at its end. Nothing on CPU.

    Phases may stand inside each other; the outer one's peak is the larger.
    """

    def __init__(self) -> None:
        self._metrics = Metrics()
        self._open: list[int] = []  # peaks of the phases that are open, before the innermost began

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the block, also when it raises."""
        self._seen_so_far(memory_use())
        self._open.append(0)
        forget_peak()
        try:
            yield
        finally:
            use, earlier = memory_use(), self._open.pop()
            if use is not None:
                peak = max(use.peak, earlier)
                self._metrics.add_max(PEAK + name, peak / GIB)
                self._metrics.add_max(HELD + name, use.held / GIB)
                self._seen_so_far(MemoryUse(peak, use.held))
            forget_peak()

    def take_metrics(self) -> Metrics:
        """This rank's, of all phases since the last call; over ranks the largest counts."""
        metrics, self._metrics = self._metrics, Metrics()
        return metrics

    def _seen_so_far(self, use: MemoryUse | None) -> None:
        """The phase around the one that begins or has ended goes on, and its peak must not be forgotten."""
        if self._open and use is not None:
            self._open[-1] = max(self._open[-1], use.peak)


def largest_peak(metrics: Mapping[str, float]) -> float | None:
    """GiB, of all phases of a step; None on CPU."""
    return max((value for name, value in metrics.items() if name.startswith(PEAK)), default=None)
