"""What an exported Hugging Face directory holds, tensor by tensor, cast or quantized on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_rpp.conversion.sources import Source, TensorInfo
from megatron_rpp.model.hf_io.fp8_blocks import SCALE_SUFFIX, is_quantized, quantize, scale_shape
from megatron_rpp.model.hf_io.safetensors_writer import Entry


class HFStream:
    """The entries of an export, and their values in any order of files."""

    def __init__(self, source: Source, dtype: torch.dtype | None, fp8: bool) -> None:
        """dtype: of every tensor but FP8 weights, their scales and what keeps its own; None: as stored."""
        self._source, self._dtype, self._fp8 = source, dtype, fp8
        self._scales: dict[str, Tensor] = {}  # of a weight that was just given, until the file takes it
        self.entries: list[Entry] = [entry for name in source.tensors for entry in self._entries(name)]

    @property
    def main_dtype(self) -> torch.dtype:
        """What config.json calls the model's dtype: that of most of the bytes, before FP8."""
        held: dict[torch.dtype, int] = {}
        for name, info in self._source.tensors.items():
            dtype = self._cast(info)
            held[dtype] = held.get(dtype, 0) + Entry(name, dtype, info.shape).nbytes
        return max(held, key=lambda dtype: held[dtype])

    def tensors(self, entries: Sequence[Entry]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of each entry; one parameter is in memory at a time."""
        for entry in entries:
            yield entry.name, self._value(entry)

    def _entries(self, name: str) -> list[Entry]:
        info = self._source.tensors[name]
        if self._quantizes(name):
            scale = Entry(name + SCALE_SUFFIX, torch.float32, scale_shape(info.shape))
            return [Entry(name, torch.float8_e4m3fn, info.shape), scale]
        return [Entry(name, self._cast(info), info.shape)]

    def _cast(self, info: TensorInfo) -> torch.dtype:
        return info.dtype if info.keeps_dtype or self._dtype is None else self._dtype

    def _value(self, entry: Entry) -> Tensor:
        if entry.name in self._source.tensors:
            value = self._source.read(entry.name)
            if not self._quantizes(entry.name):
                return value.to(entry.dtype)
            return self._quantized(entry.name, value)
        if entry.name not in self._scales:  # its weight is in a file that an earlier start has written
            weight = entry.name.removesuffix(SCALE_SUFFIX)
            self._quantized(weight, self._source.read(weight))
        return self._scales.pop(entry.name)

    def _quantized(self, name: str, value: Tensor) -> Tensor:
        try:
            quantized, scale = quantize(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        self._scales[name + SCALE_SUFFIX] = scale
        return quantized

    def _quantizes(self, name: str) -> bool:
        return self._fp8 and is_quantized(name, self._source.tensors[name].shape)
