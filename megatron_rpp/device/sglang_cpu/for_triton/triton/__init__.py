"""An inert triton, because SGLang decorates kernels with it everywhere and launches none on CPU.

Any attribute and any submodule exists. Decorators give the function back, so that the modules of
SGLang import; `cdiv` and `next_power_of_2` are real, since SGLang calls them outside kernels.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

__version__ = "3.7.0"
__path__ = []  # a package, whose submodules `_Finder` makes


class _Anything:
    """A type, a value, a decorator or a decorator with arguments, as the caller likes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "active":  # of triton.runtime.driver: SGLang asks it for the device, and takes the CPU
            raise RuntimeError("0 active drivers")
        return _Anything()

    def __getitem__(self, key: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()  # as a base class, it adds nothing


class Config:
    """A candidate of `autotune`; SGLang reads its keyword arguments back."""

    def __init__(self, kwargs: dict[str, Any], **options: Any) -> None:
        self.kwargs = kwargs
        vars(self).update(options)


def cdiv(x: int, y: int) -> int:
    return (x + y - 1) // y


def next_power_of_2(n: int) -> int:
    return 1 if n < 1 else 1 << (n - 1).bit_length()


def _anything(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything()


__getattr__: Callable[[str], Any] = _anything


class _Finder(MetaPathFinder, Loader):
    """Makes an empty module, with any attribute, for every `triton.x.y`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("triton."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _anything  # type: ignore[method-assign]


sys.meta_path.insert(0, _Finder())
