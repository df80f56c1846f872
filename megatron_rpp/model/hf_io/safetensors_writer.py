"""Write safetensors files one tensor at a time: what they hold is planned first, then streamed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from megatron_rpp.model.hf_io.chunked_file import ChunkedFile
from megatron_rpp.model.hf_io.safetensors_reader import DTYPES, METADATA

INDEX_NAME = "model.safetensors.index.json"
WHOLE_NAME = "model.safetensors"
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_files(entries: Sequence[Entry], max_bytes: int) -> list[tuple[str, list[Entry]]]:
    """(file name, its tensors) in the order given; at most `max_bytes` of data a file.

    A tensor larger than that has a file of its own. One file is `model.safetensors`, several are
    `model-00001-of-0000n.safetensors`.
    """
    return name_files(split_entries(entries, max_bytes))


def split_entries(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """`entries` in runs of at most `max_bytes`, or of one larger tensor. ValueError unless max_bytes > 0."""
    if max_bytes <= 0:
        raise ValueError(f"max_bytes={max_bytes} must be positive")
    runs: list[list[Entry]] = []
    used = 0
    for entry in entries:
        if not runs or used + entry.nbytes > max_bytes:
            runs.append([])
            used = 0
        runs[-1].append(entry)
        used += entry.nbytes
    return runs


def name_files(runs: Sequence[Sequence[Entry]]) -> list[tuple[str, list[Entry]]]:
    """A file name for each run. Where several processes write, join their runs first: names count all."""
    if len(runs) == 1:
        return [(WHOLE_NAME, list(runs[0]))]
    return [(f"model-{i:05d}-of-{len(runs):05d}.safetensors", list(run)) for i, run in enumerate(runs, start=1)]


def write_file(
    path: str | Path,
    entries: Sequence[Entry],
    tensors: Iterable[tuple[str, Tensor]],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write `tensors` to `path`, which appears under that name only when it is whole and on disk.

    `tensors` are consumed one at a time, on any device, and must be `entries` in their order: exactly
    len(entries) are taken, so one iterator can feed several files, and after an error the rest of it
    can still be run to its end. `progress` is called with the bytes of each tensor once written.

    Raises ValueError for a tensor that is not its entry, and OSError that names the file.
    """
    header = _header(entries)
    partial = f"{path}.tmp"
    try:
        with ChunkedFile(partial, "wb") as file:
            _write(file, header)
            stream = iter(tensors)
            for entry in entries:
                _write_next(file, entry, stream)
                if progress is not None:
                    progress(entry.nbytes)
            with _naming(file):
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def write_index(folder: str | Path, files: Sequence[tuple[str, Sequence[Entry]]]) -> None:
    """Write the index of `files`, (name, tensors) as plan_files gives them; nothing for a single file."""
    if len(files) < 2:
        return
    total = sum(entry.nbytes for _, entries in files for entry in entries)
    weight_map = {entry.name: file for file, entries in files for entry in entries}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (Path(folder) / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(entries: Sequence[Entry]) -> bytes:
    """Length and JSON. ValueError for a name given twice or reserved, and a dtype the format lacks."""
    header: dict[str, object] = {METADATA: {"format": "pt"}}  # transformers refuses files without a format
    offset = 0
    for entry in entries:
        if entry.name in header:
            raise ValueError(f"{entry.name} cannot be a tensor's name: it is given twice or reserved")
        if entry.dtype not in _NAME_OF:
            raise ValueError(f"{entry.name}: safetensors cannot hold {entry.dtype}; convert it first")
        end = offset + entry.nbytes
        header[entry.name] = {
            "dtype": _NAME_OF[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return len(text).to_bytes(8, "little") + text


def _write_next(file: FileIO, entry: Entry, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Take one tensor and write it; its reference goes with this frame, before the next is made."""
    name, tensor = next(tensors, (None, None))
    if name is None or tensor is None:
        raise ValueError(f"{file.name}: the tensors end before {entry.name}")
    found = Entry(name, tensor.dtype, tuple(tensor.shape))
    if found != entry:
        raise ValueError(f"{file.name}: {found} comes where {entry} was planned")
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    _write(file, flat.view(torch.uint8).numpy().data)


def _write(file: FileIO, data: bytes | memoryview) -> None:
    with _naming(file):
        file.write(data)


@contextmanager
def _naming(file: FileIO) -> Iterator[None]:
    """An OSError of the body, which names no file (a full disk), is raised again with that of `file`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from error
