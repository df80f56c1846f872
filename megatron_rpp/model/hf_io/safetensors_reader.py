"""Read a safetensors file: its header, checked against its size, then tensors mapped from it.

File: 8 bytes, little-endian length of the header; the header, JSON, padded with spaces; the data.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
METADATA = "__metadata__"  # a key of the header that is no tensor
_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # safetensors' own limit
_LFS_POINTER = b"version "  # how its text starts; as a length it would be absurd
_ADVICE = "download or save it again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file holds it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PlacedTensor(StoredTensor):
    """Its bytes are [start, end) of the file."""

    start: int
    end: int


class SafetensorsFile:
    """One file, its header read."""

    def __init__(self, path: Path) -> None:
        """ValueError, naming the file and where it can be told the tensor, if it is damaged or cut."""
        self.path = path
        self.tensors = read_header(path)

    def read(self, name: str) -> Tensor:
        """The tensor, mapped: a slice costs its own pages, which go when the last view of it does.

        Writing to it changes neither the file nor what others read.
        """
        stored = self.tensors[name]
        if stored.start == stored.end:
            return torch.empty(stored.shape, dtype=stored.dtype)
        # The tensor's own pages alone: of a file larger than memory Linux maps no private whole.
        first = stored.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        try:
            with self.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), stored.end - first, mmap.MAP_PRIVATE, offset=first)
        except (OSError, ValueError) as error:  # ValueError: the file is shorter than it was
            raise ValueError(f"{self.path}: cannot read the tensor {name}: {error}; is it still as it was?") from error
        flat = torch.frombuffer(mapped, dtype=torch.uint8, offset=stored.start - first, count=stored.end - stored.start)
        if stored.start % stored.dtype.itemsize:  # other writers need not align
            flat = flat.clone()
        return flat.view(stored.dtype).view(stored.shape)


def read_header(path: Path) -> dict[str, PlacedTensor]:
    """The tensors of the file by name, checked against the file's size; reads the header alone.

    Raises ValueError, naming the file and where it can be told the tensor, for a damaged or cut file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(_LENGTH_BYTES)
        if first == _LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file; run git lfs pull")
        length = int.from_bytes(first, "little")
        if size < _LENGTH_BYTES or length > min(_LONGEST_HEADER, size - _LENGTH_BYTES):
            raise ValueError(f"{path} is damaged: {size} bytes do not hold its header; {_ADVICE}")
        text = file.read(length)
    try:
        header = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header is not JSON ({error}); {_ADVICE}") from error
    header.pop(METADATA, None)
    tensors = {name: _stored(path, name, entry, _LENGTH_BYTES + length) for name, entry in header.items()}
    _require_data(path, tensors, _LENGTH_BYTES + length, size)
    return tensors


def _stored(path: Path, name: str, entry: Any, data_start: int) -> PlacedTensor:
    try:
        dtype_name, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = [*shape, start, end]
        if not isinstance(dtype_name, str) or any(type(n) is not int or n < 0 for n in numbers):
            raise TypeError(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its header says nothing usable of {name}; {_ADVICE}") from error
    if dtype_name not in DTYPES:
        raise ValueError(f"{path}: {name} is stored as {dtype_name}; convert it to one of {', '.join(DTYPES)}")
    dtype = DTYPES[dtype_name]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{path} is damaged: {name}, {dtype_name} {list(shape)}, is given {end - start} bytes; {_ADVICE}"
        )
    return PlacedTensor(dtype, shape, data_start + start, data_start + end)


def _require_data(path: Path, tensors: dict[str, PlacedTensor], data_start: int, size: int) -> None:
    """The tensors cover the data without a hole or an overlap, and the file ends where the last does."""
    expected = data_start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if stored.start != expected:
            raise ValueError(f"{path} is damaged: {name} starts at byte {stored.start}, not {expected}; {_ADVICE}")
        if stored.end > size:
            raise ValueError(
                f"{path} is damaged: it is cut off in the tensor {name}, which ends at byte {stored.end} "
                f"of {size}; {_ADVICE}"
            )
        expected = stored.end
    if expected != size:
        raise ValueError(f"{path} is damaged: {size - expected} bytes follow its last tensor; {_ADVICE}")
