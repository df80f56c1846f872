"""The only home of torch.cuda, and of the choice of backend and dtype.

Importing this package where there is no CUDA makes torch ready for Megatron-Core on CPU (see cpu.py).
Packages that import megatron import this one first, in their __init__.
"""

from __future__ import annotations

import os

import torch

from megatron_rpp.device import cpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def has_cuda() -> bool:
    """Whether this process computes on GPUs."""
    return torch.cuda.is_available() and not getattr(torch.cuda, "_rpp_cpu", False)


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
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def dtype(name: str) -> torch.dtype:
    """The torch dtype of a config name such as "bfloat16"."""
    return DTYPES[name]


if not has_cuda():
    cpu.install()
