"""The only home of torch.cuda, and of the choice of backend and dtype.

Importing this package where there is no CUDA makes torch ready for Megatron-Core on CPU (see cpu.py).
Packages that import megatron import this one first, in their __init__.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_rpp.device import cpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_instead: torch.device | None = None  # set by without_memory


def has_cuda() -> bool:
    """Whether this process computes on GPUs."""
    return _instead is None and torch.cuda.is_available() and not getattr(torch.cuda, "_rpp_cpu", False)


def select() -> torch.device:
    """Select and return this rank's device, by LOCAL_RANK on a GPU host."""
    if has_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return current()


def backend() -> str:
    """The torch.distributed backend of the trainer's groups: nccl, or gloo on CPU."""
    return "nccl" if has_cuda() else "gloo"


def current() -> torch.device:
    """The device that this rank's tensors live on."""
    if _instead is not None:
        return _instead
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


@contextmanager
def without_memory() -> Iterator[None]:
    """What is built inside has shapes and no values: this rank's device is torch's meta device."""
    global _instead
    _instead = torch.device("meta")
    try:
        with _instead:
            yield
    finally:
        _instead = None


def dtype(name: str) -> torch.dtype:
    """The torch dtype of a config name such as "bfloat16"."""
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name that config files and headers give a torch dtype: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


if not has_cuda():
    cpu.install()
