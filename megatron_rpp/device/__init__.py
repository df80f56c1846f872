"""The only home of torch.cuda, and of the choice of backend and dtype.

Importing this package where there is no CUDA makes torch ready for Megatron-Core on CPU (see cpu.py).
Packages that import megatron import this one first, in their __init__.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_rpp.config.own_environment import SET_HERE as SET_HERE  # server_command.py's, too
from megatron_rpp.config.own_environment import set_own
from megatron_rpp.device import cpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_instead: torch.device | None = None  # set by without_memory


def has_cuda() -> bool:
    """Whether this process computes on GPUs."""
    return _instead is None and torch.cuda.is_available() and not getattr(torch.cuda, "_rpp_cpu", False)


def select(local_rank: int = 0) -> torch.device:
    """Select and return this rank's device: of the GPUs that it sees, the only one or that of its place on the host.

    ValueError where there are fewer.
    """
    if has_cuda():
        count = torch.cuda.device_count()
        if local_rank >= count > 1:
            raise ValueError(
                f"{count} GPUs are visible to local rank {local_rank}; start as many ranks on a host as it has GPUs, "
                "or give each its own (srun --gpus-per-task=1)"
            )
        torch.cuda.set_device(local_rank if count > 1 else 0)  # srun may show each task its own GPU alone
    return current()


def identity() -> str | None:
    """Names this rank's GPU among those of its host; None on CPU."""
    return str(torch.cuda.get_device_properties(current()).uuid) if has_cuda() else None


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


def free_cached_memory() -> None:
    """Give the GPU back what torch keeps of this rank's memory for its next tensors; nothing on CPU."""
    if has_cuda():
        torch.cuda.empty_cache()


def dtype(name: str) -> torch.dtype:
    """The torch dtype of a config name such as "bfloat16"."""
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name that config files and headers give a torch dtype: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def rng_state() -> torch.Tensor | None:
    """State of this rank's device generator; None on CPU, whose generator is torch's own."""
    return torch.cuda.get_rng_state() if has_cuda() else None


def set_rng_state(state: torch.Tensor | None) -> None:
    """Undo `rng_state`; nothing where either side has no device generator."""
    if state is not None and has_cuda():
        torch.cuda.set_rng_state(state)


# torch's compiler would start up to 32 processes for each rank of the host. Read when torch._inductor is imported.
set_own({"TORCHINDUCTOR_COMPILE_THREADS": "1"})
if not has_cuda():
    cpu.install()
