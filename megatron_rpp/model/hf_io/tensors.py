"""The tensors of a Hugging Face directory, checked as it is opened and mapped as they are read."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from megatron_rpp.model.hf_io.fp8_blocks import SCALE_SUFFIX, dequantize, scale_shape
from megatron_rpp.model.hf_io.quantization import weight_block
from megatron_rpp.model.hf_io.safetensors_reader import StoredTensor
from megatron_rpp.model.hf_io.weight_files import open_tensors

_COMPUTED = "rotary_emb.inv_freq"  # a buffer that old Llama checkpoints hold
_SHOWN = 3  # names that an error lists
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


class HFTensors:
    """Tensors by name. Block-scaled FP8 weights are read as plain ones; their scales have no names here."""

    def __init__(
        self, path: str, *, allow_pickle: bool = False, dequantized_dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """Open a directory: every header is read and checked, and no data.

        allow_pickle: read pytorch_model.bin, as weights alone, where there are no safetensors.
        dequantized_dtype: of FP8 weights once read.

        Raises ValueError, naming file and tensor, for whatever of weight_files.open_tensors, a quantization that
        cannot be read, and an FP8 weight whose scales are missing or of another shape.
        """
        self.path = Path(path)
        self.dequantized_dtype = dequantized_dtype
        self._block = weight_block(self.path)
        self._files = open_tensors(self.path, allow_pickle)
        self._scale_of = {
            name: self._scale(name) for name, file in self._files.items() if file.tensors[name].dtype in _FP8
        }
        self.names: tuple[str, ...] = tuple(sorted(self._files.keys() - set(self._scale_of.values())))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor. This and the methods below raise ValueError where the directory lacks it."""
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """What `read` returns."""
        return self.dequantized_dtype if name in self._scale_of else self._stored(name).dtype

    def stored_dtype(self, name: str) -> torch.dtype:
        """What the file holds: float8 for a quantized weight."""
        return self._stored(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes of what `read` returns."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def file_of(self, name: str) -> str:
        """Name, in the directory, of the file that holds the tensor."""
        self._stored(name)
        return self._files[name].path.name

    def read(self, name: str) -> Tensor:
        """The whole tensor. Mapped, so that a slice costs only itself, unless it had to be dequantized.

        Raises ValueError where the directory lacks it or its file can no longer be read.
        """
        self._stored(name)
        value = self._files[name].read(name)
        if name not in self._scale_of:
            return value
        scale = self._scale_of[name]
        return dequantize(value, self._files[scale].read(scale), self.dequantized_dtype, self._block)

    def is_copy(self, name: str, of: str) -> bool:
        """Whether `name` holds what the tensor `of` does. ValueError where the directory lacks one."""
        first, second = self.read(of), self.read(name)
        return first.shape == second.shape and torch.equal(first, second)

    def require_no_others(self, expected: Collection[str]) -> None:
        """ValueError where the directory holds a tensor that is not expected."""
        others = sorted(set(self.names) - set(expected))
        others = [name for name in others if not name.endswith(_COMPUTED)]
        if others:
            shown = ", ".join(f"{name} in {self.file_of(name)}" for name in others[:_SHOWN])
            raise ValueError(
                f"{self.path} holds {len(others)} tensors that its config.json does not imply ({shown}"
                f"{', ...' if len(others) > _SHOWN else ''}); check num_hidden_layers, and merge adapters first"
            )

    def _stored(self, name: str) -> StoredTensor:
        if name not in self._files:
            raise ValueError(f"{self.path} lacks the tensor {name}, which its config.json implies")
        return self._files[name].tensors[name]

    def _scale(self, name: str) -> str:
        """Name of the scales of the FP8 weight `name`, once they are found to fit it."""
        file, scale = self._files[name], name + SCALE_SUFFIX
        shape = file.tensors[name].shape
        if scale not in self._files:
            raise ValueError(
                f"{file.path}: {name} is FP8, and the directory lacks its scales {scale}; only block-scaled FP8 is "
                "read: download the model again, or start from its unquantized checkpoint"
            )
        found = self._stored(scale)
        needed = scale_shape(shape, self._block) if len(shape) == 2 else None
        if needed is None or found.shape != needed or found.dtype not in _SCALES:
            raise ValueError(
                f"{self._files[scale].path}: {scale} {found.dtype} {found.shape} does not scale {name} {shape} in "
                f"blocks of {self._block}; check quantization_config.weight_block_size in config.json"
            )
        return scale
