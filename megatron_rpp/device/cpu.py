"""What unpatched Megatron-Core needs to run where there is no CUDA.

Megatron-Core asks for CUDA by name: `device="cuda"` in factory functions, `torch.cuda.current_device()`
as a device argument, streams, the CUDA generator, `tensor.type() == "torch.cuda.FloatTensor"`.
`install()` answers each of these with its CPU meaning. It must run before the first megatron import,
changes torch only (never megatron), and is refused where CUDA exists.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

CPU = torch.device("cpu")
torch_compile = torch.compile  # which install() turns off

# Factory functions that megatron calls with device="cuda".
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "zeros_like", "empty_like")


def install() -> None:
    """Route Megatron-Core's CUDA calls to the CPU. Idempotent."""
    assert not torch.cuda.is_available(), "device.cpu stands in for CUDA only where there is none"
    if getattr(torch.cuda, "_rpp_cpu", False):
        return
    torch.cuda._rpp_cpu = True  # type: ignore[attr-defined]
    _route_factories()
    _route_tensor_methods()
    _stand_in_for_streams()
    _route_rng()
    torch.compile = _run_eagerly  # type: ignore[assignment]


def _run_eagerly(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """In place of torch.compile: megatron's `jit_fuser` would build small C++ kernels at start-up."""
    return function if function is not None else lambda f: f


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        # `get_pos_emb_on_this_cp_rank` pins an index for the copy to the GPU; without one there is no such memory.
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return call


def _route_factories() -> None:
    # `with torch.device(...)` knows the factory functions by identity; let it remember the originals.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in ("FloatTensor", "IntTensor", "LongTensor"):
        setattr(torch.cuda, name, getattr(torch, name))


def _route_tensor_methods() -> None:
    original_to, original_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(CPU if _is_cuda(a) else a for a in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original_to(self, *args, **kwargs)

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # clip_grads.py and distrib_optimizer.py compare type() with "torch.cuda.FloatTensor".
        answer = original_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.to = to  # type: ignore[method-assign, assignment]
    torch.Tensor.type = tensor_type  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]


class _Stream:
    """Work on the CPU is already in order, so every wait has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def record_event(self, event: Any = None) -> _Stream:
        return self


def _nothing() -> Callable[..., None]:
    """A new function each time: torch._dynamo refuses one object under two torch names."""
    return lambda *args, **kwargs: None


def _stand_in_for_streams() -> None:
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(torch.cuda, name, _nothing())
    for name in ("range_push", "range_pop"):
        setattr(torch.cuda.nvtx, name, _nothing())
    for name in ("current_stream", "default_stream"):
        setattr(torch.cuda, name, lambda *a, **k: _Stream())
    torch.cuda.Stream = _Stream  # type: ignore[assignment, misc]
    torch.cuda.Event = _Stream  # type: ignore[assignment, misc]
    torch.cuda.stream = lambda *a, **k: contextlib.nullcontext()  # type: ignore[assignment]
    torch.cuda.is_current_stream_capturing = lambda: False  # type: ignore[assignment]


def _route_rng() -> None:
    """tensor_parallel.random keeps one generator state per name; on CPU they are states of one generator."""
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *a, **k: torch.get_rng_state()  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)  # type: ignore[assignment]
    torch.cuda.random.get_rng_state = lambda *a, **k: torch.get_rng_state()  # type: ignore[assignment]
    torch.cuda._lazy_call = lambda callback, **k: callback()  # type: ignore[attr-defined]
    torch.cuda.default_generators = _CpuGenerators()  # type: ignore[assignment]


class _CpuGenerators:
    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator
