"""PyTorch's own checkpoint files (pytorch_model.bin), which are pickles, read as weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rpp.model.hf_io.safetensors_reader import StoredTensor


class PickleFile:
    """One file of tensors by name. No object but tensors is ever built from it."""

    def __init__(self, path: Path) -> None:
        """ValueError, naming the file and where it can be told the tensor, if it is damaged."""
        self.path = path
        self.tensors = {name: StoredTensor(t.dtype, tuple(t.shape)) for name, t in self._load().items()}

    def read(self, name: str) -> Tensor:
        """The tensor, mapped from the file; nothing else of the file stays mapped once it is freed."""
        return self._load()[name].detach()

    def _load(self) -> dict[str, Tensor]:
        try:
            tensors: Any = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except MemoryError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{self.path} cannot be read as a checkpoint of weights alone: {reason}; download it again, "
                "or save the model with safetensors"
            ) from error
        if not isinstance(tensors, dict):
            raise ValueError(f"{self.path} holds a {type(tensors).__name__}, not tensors by name")
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise ValueError(f"{self.path}: {name} is a {type(tensor).__name__}, not a tensor; save weights alone")
        return tensors
