"""Read any box of any model tensor of a Megatron checkpoint, and nothing more."""

from __future__ import annotations

import pickle
from collections import defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_rpp.conversion.pieces import Piece
from megatron_rpp.model.load_megatron import read_metadata

_NOT_THE_MODEL = ("optimizer.", "chained_", "rng_state", "rerun_state")


class MegatronTensors:
    """The model's tensors of a checkpoint, by Megatron key; what else a training run saved is left out."""

    def __init__(self, path: str | Path) -> None:
        """ValueError where it is no `torch_dist` checkpoint, or a file is missing, damaged or cut off."""
        self.path = Path(path)
        self.metadata = read_metadata(path)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in self.metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata) and not key.startswith(_NOT_THE_MODEL)
        }
        self._reader = FileSystemReader(self.path)
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        self._stacked: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    def dtype(self, key: str) -> torch.dtype:
        """Of the whole tensor `key`."""
        dtype: torch.dtype = self.tensors[key].properties.dtype
        return dtype

    def read(self, piece: Piece) -> Tensor:
        """The stored tensor of the box, shaped like piece.value. ValueError where a file is damaged."""
        box = ChunkStorageMetadata(torch.Size(piece.offsets), piece.sizes)
        stored = replace(self.tensors[piece.key], chunks=self._near(piece))
        items = create_read_items_for_chunk_list(piece.key, stored, [box])
        if sum(item.lengths.numel() for item in items) != piece.sizes.numel():
            raise ValueError(f"{self.path}: its index does not cover {piece.key} at {piece.offsets}; convert it again")
        into = _Taking() if len(items) == 1 else _Into(torch.empty(tuple(piece.sizes), dtype=self.dtype(piece.key)))
        try:
            self._reader.read_data(LoadPlan(items), into).wait()
        # torch.load finds damage in any of these ways; the text of an UnpicklingError advises to run foreign code.
        except (RuntimeError, OSError, AssertionError, EOFError, pickle.UnpicklingError) as error:
            files = ", ".join(dict.fromkeys(self._file_of(item) for item in items))
            known = "" if isinstance(error, pickle.UnpicklingError) else (str(error).splitlines() or [""])[0]
            reason = known or "it is damaged"
            raise ValueError(f"{files}: cannot read {piece.key}: {reason}; convert or copy it again") from error
        return into.out.reshape(piece.value.shape).to(self.dtype(piece.key))

    def _near(self, piece: Piece) -> list[ChunkStorageMetadata]:
        """Stored chunks that may meet the box: of its layer and expert alone, where these are stacked."""
        chunks: list[ChunkStorageMetadata] = self.tensors[piece.key].chunks
        if not piece.prepended:
            return chunks
        if piece.key not in self._stacked:
            grouped: dict[tuple[int, ...], list[ChunkStorageMetadata]] = defaultdict(list)
            for chunk in chunks:
                axes = zip(chunk.offsets, chunk.sizes, range(piece.prepended), strict=False)
                for stacked in product(*(range(start, start + size) for start, size, _ in axes)):
                    grouped[stacked].append(chunk)
            self._stacked[piece.key] = grouped
        return self._stacked[piece.key].get(tuple(piece.offsets[: piece.prepended]), [])

    def _file_of(self, item: ReadItem) -> str:
        storage: dict[MetadataIndex, object] = self.metadata.storage_data or {}
        return str(self.path / storage[item.storage_index].relative_path)  # type: ignore[attr-defined]


class _Into(DefaultLoadPlanner):
    """Everything that is read lands in one tensor."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self.out
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, start, length)
        return view


class _Taking(DefaultLoadPlanner):
    """The only tensor that is read is taken as it is: torch's reader would copy it into one of ours."""

    out: Tensor

    def resolve_tensor(self, read_item: ReadItem) -> Any:
        self._lengths = read_item.lengths
        return self

    def detach(self) -> Any:
        """With `size` and `copy_`, what torch's reader asks of its target."""
        return self

    def size(self) -> torch.Size:
        return self._lengths

    def copy_(self, tensor: Tensor) -> None:
        self.out = tensor
