"""torch's compiler, for kernels of our own: C++ on CPU, Triton on GPUs."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from megatron_rpp import device
from megatron_rpp.device.cpu import torch_compile


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled whole when it is first called.

    One that cannot be, or is compiled for too many kinds of arguments, raises: it would run unfused in silence.
    """

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch_compile(function, fullgraph=True)  # imports much

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return compiled()(*args)

    return call


def any_size(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Another view of `tensor`, whose size in `dim` no kernel is compiled anew for (but 1, which is apart)."""
    view = tensor.detach()
    torch._dynamo.maybe_mark_dynamic(view, dim)
    return view


def forget_kernels() -> None:
    """All that was compiled in this process, Megatron's too, is compiled anew when it is next called."""
    torch._dynamo.reset()


@functools.cache
def why_no_kernels() -> str | None:
    """What keeps `kernel` from compiling on this host, in words; None where nothing does."""
    if not device.has_cuda():
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            return "there is no C++ compiler (set CXX, or install g++)"
        return None
    from torch.utils._triton import has_triton

    if not has_triton():
        return "Triton is not installed, or does not know this GPU"
    # Triton builds the launcher of each kernel with it.
    if not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        return "there is no C compiler (set CC, or install gcc)"
    return None
