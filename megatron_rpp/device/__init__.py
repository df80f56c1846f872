"""The only home of torch.cuda, and of the choice of backend and dtype."""

from __future__ import annotations

import os

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def has_cuda() -> bool:
    """Whether this process computes on GPUs."""
    return torch.cuda.is_available() and not getattr(torch.cuda, "_rpp_cpu", False)


def prepare() -> torch.device:
    """Select this rank's device. Call it before the first megatron import."""
    if has_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())
    from megatron_rpp.device import cpu

    cpu.install()
    return torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend of the trainer's groups: nccl, or gloo on CPU."""
    return "nccl" if has_cuda() else "gloo"


def current() -> torch.device:
    """The device that this rank's tensors live on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def dtype(name: str) -> torch.dtype:
    """The torch dtype of a config name such as "bfloat16"."""
    return DTYPES[name]
