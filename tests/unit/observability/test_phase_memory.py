"""Peak memory by phase, with a stand-in for the GPU's account."""

from __future__ import annotations

import pytest

from megatron_rpp.device.memory import MemoryUse
from megatron_rpp.observability import memory
from megatron_rpp.observability.memory import GIB, PhaseMemory, largest_peak
from megatron_rpp.observability.metrics import merged


class Allocator:
    """Counts as torch's does."""

    held = peak = 0

    def use(self) -> MemoryUse:
        return MemoryUse(self.peak * GIB, self.held * GIB)

    def forget_peak(self) -> None:
        self.peak = self.held

    def change(self, by: int) -> None:
        self.held += by
        self.peak = max(self.peak, self.held)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    found = Allocator()
    monkeypatch.setattr(memory, "memory_use", found.use)
    monkeypatch.setattr(memory, "forget_peak", found.forget_peak)
    return found


def test_each_phase_has_its_own_peak_and_what_it_leaves(gpu: Allocator) -> None:
    phase = PhaseMemory()
    gpu.change(10)
    with phase("score"):
        gpu.change(30)
        gpu.change(-35)
    with phase("train"):
        gpu.change(3)
    assert phase.take_metrics().as_dict() == {
        "memory/peak_gib/score": 40.0,
        "memory/allocated_gib/score": 5.0,
        "memory/peak_gib/train": 8.0,
        "memory/allocated_gib/train": 8.0,
    }
    assert phase.take_metrics().as_dict() == {}, "each step begins with none"


def test_a_phase_inside_another_does_not_hide_the_outer_ones_peak(gpu: Allocator) -> None:
    phase = PhaseMemory()
    with phase("outer"):
        gpu.change(20)
        gpu.change(-20)
        with phase("inner"):
            gpu.change(4)
            gpu.change(-4)
    found = phase.take_metrics().as_dict()
    assert found["memory/peak_gib/outer"] == 20.0 and found["memory/peak_gib/inner"] == 4.0
    with phase("outer"), phase("inner"):
        gpu.change(7)
    assert phase.take_metrics().as_dict()["memory/peak_gib/outer"] == 7.0


def test_a_phase_that_runs_twice_or_fails_is_counted_with_its_largest(gpu: Allocator) -> None:
    phase = PhaseMemory()
    with pytest.raises(RuntimeError), phase("eval"):
        gpu.change(9)
        raise RuntimeError("out of memory")
    gpu.change(-9)
    with phase("eval"):
        gpu.change(2)
    assert phase.take_metrics().as_dict()["memory/peak_gib/eval"] == 9.0


def test_over_ranks_the_fullest_counts(gpu: Allocator) -> None:
    parts = []
    for size in (3, 11, 5):
        phase = PhaseMemory()
        with phase("train"):
            gpu.change(size)
        gpu.change(-size)
        parts.append(phase.take_metrics())
    values = merged(parts).as_dict()
    assert values["memory/peak_gib/train"] == largest_peak(values) == 11.0


def test_nothing_is_reported_on_cpu() -> None:
    phase = PhaseMemory()
    with phase("train"):
        pass
    assert phase.take_metrics().as_dict() == {} and largest_peak({"time/train": 1.0}) is None
