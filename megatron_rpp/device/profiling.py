"""What a GPU's profilers are told: named ranges, when to record, what memory is whose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from megatron_rpp import device
from megatron_rpp.device.memory import wait_for_device

_HISTORY_EVENTS = 1_000_000  # allocations and frees that a snapshot goes back; about 1 GB of host memory


def activities() -> list[ProfilerActivity]:
    """What torch's profiler watches here."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.has_cuda() else [])]


@contextmanager
def nvtx_range(name: str) -> Iterator[None]:
    """A named range in the timeline of Nsight Systems; nothing on CPU."""
    if not device.has_cuda():
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


@contextmanager
def nsys_capture() -> Iterator[None]:
    """What `nsys profile --capture-range=cudaProfilerApi` records, with a range for each operation of torch."""
    wait_for_device()
    torch.cuda.profiler.start()
    try:
        with torch.autograd.profiler.emit_nvtx():
            yield
        wait_for_device()
    finally:
        torch.cuda.profiler.stop()


@contextmanager
def memory_history(snapshot: Path) -> Iterator[None]:
    """Write every allocation inside to `snapshot`, a pickle for pytorch.org/memory_viz; also of a block that raises:
    out of memory is what it is for."""
    torch.cuda.memory._record_memory_history(max_entries=_HISTORY_EVENTS)
    try:
        yield
    finally:
        torch.cuda.memory._dump_snapshot(str(snapshot))
        torch.cuda.memory._record_memory_history(enabled=None)
