"""An inert sgl_kernel, because SGLang imports names from it and calls none on CPU with native backends.

The registry's build holds CUDA code only.
"""

from collections.abc import Callable
from typing import Any


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} needs CUDA")

    return missing
