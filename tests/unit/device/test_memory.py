"""What is asked of memory on a GPU, as far as a CPU tells."""

from __future__ import annotations

import torch

from megatron_rpp.device import memory


def test_torch_has_the_functions_that_gpus_are_asked_by() -> None:
    """Private or renamed ones would fail on a GPU alone."""
    names = ("max_memory_allocated", "memory_allocated", "reset_peak_memory_stats")
    assert all(callable(getattr(torch.cuda, name)) for name in names)


def test_nothing_is_counted_on_cpu_and_host_memory_is_plain() -> None:
    memory.forget_peak()
    assert memory.memory_use() is None
    block = memory.host_block(64)
    assert block.shape == (64,) and block.dtype == torch.uint8 and not block.is_pinned()
