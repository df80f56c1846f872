"""Transformer Engine's own Python classes where its compiled part cannot be: to build its layers, never to run them.

Its wheel for any platform holds the Python part; `make setup` unpacks the release that GPU hosts use beside the
environment's packages (requirements/te-python.txt), out of everybody's import path.
"""

from __future__ import annotations

import enum
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import MagicMock

import torch

TE_PYTHON = Path(sys.prefix) / "te-python"
# Compiled, or for GPUs alone. `onnxscript` is for export to ONNX.
_ABSENT = ("transformer_engine_torch", "transformer_engine.pytorch.triton", "transformer_engine.common.triton",
           "transformer_engine.pytorch.onnx_extensions", "triton", "onnxscript")  # fmt: skip


def import_te_classes() -> None:
    """Make `import transformer_engine.pytorch` give its classes, for the rest of this process; before any Megatron."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it looks for no shared libraries
    sys.path.insert(0, str(TE_PYTHON))
    sys.meta_path.insert(0, _Absent())
    torch.cuda.get_device_properties = lambda *args, **kwargs: SimpleNamespace(major=9, minor=0, name="")  # type: ignore[assignment,misc,return-value]
    torch.cuda.get_device_capability = lambda *args, **kwargs: (9, 0)  # type: ignore[assignment]
    importlib.import_module("transformer_engine.common").load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    importlib.import_module("transformer_engine.pytorch")


class _DType(enum.IntEnum):
    """Transformer Engine's numbers of dtypes."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class _AttentionBackend(enum.IntEnum):
    """Its import fails where these are not the ones that it knows."""

    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


class _Anything(ModuleType):
    """Has every name; those with a capital are classes in the compiled part, as annotations want."""

    DType = _DType
    NVTE_Fused_Attn_Backend = _AttentionBackend
    __version__ = "3.6.0"
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        is_class = self.__name__ == _ABSENT[0] and name[0].isupper()
        found = _Names(name, (), {}) if is_class else MagicMock(name=name)
        setattr(self, name, found)
        return found


class _Names(type):
    """A class with every attribute, each a number of its own."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return hash(name)


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what is absent, and what lies below it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        is_absent = any(fullname == name or fullname.startswith(f"{name}.") for name in _ABSENT)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if is_absent else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
