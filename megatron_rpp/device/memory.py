"""Memory of this rank's GPU, and of the host beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rpp.device import has_cuda


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of torch's tensors on this rank's GPU; what its allocator keeps for the next ones is not counted."""

    peak: int  # since `forget_peak`
    held: int  # now


def memory_use() -> MemoryUse | None:
    """Of this rank's GPU; None on CPU, where nothing keeps account."""
    return MemoryUse(torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()) if has_cuda() else None


def forget_peak() -> None:
    """The peak starts again from what is held now."""
    if has_cuda():
        torch.cuda.reset_peak_memory_stats()


def host_block(size: int) -> torch.Tensor:
    """`size` bytes of host memory, uint8; page-locked where there is a GPU, so that copies take its full speed."""
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=has_cuda())


def wait_for_device() -> None:
    """Until all that was started on this rank's GPU is done."""
    if has_cuda():
        torch.cuda.synchronize()
