"""A checkpoint read as Hugging Face tensors, whichever of the two forms it is stored in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_rpp.conversion.megatron_reader import MegatronTensors
from megatron_rpp.conversion.skeleton import Skeleton, Slot, build_skeleton
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.hf_io.tensors import HFTensors
from megatron_rpp.model.hf_mapping import family_of, read_hf_config
from megatron_rpp.model.hf_mapping.mtp import stored_mtp
from megatron_rpp.model.load_megatron import is_megatron_directory


@dataclass(frozen=True)
class TensorInfo:
    """What a header tells."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    keeps_dtype: bool = False  # a cast leaves it as it is


class Source(Protocol):
    """Tensors under their Hugging Face names; `tensors` costs no data."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        ...


class HFSource:
    """A Hugging Face directory. FP8 weights are read dequantized, as bfloat16."""

    def __init__(self, path: str | Path, *, allow_pickle: bool = False) -> None:
        """ValueError, naming file and tensor, where headers are missing or damaged."""
        self._files = HFTensors(str(path), allow_pickle=allow_pickle)
        self.tensors = {n: TensorInfo(self._files.dtype(n), tuple(self._files.shape(n))) for n in self._files.names}

    def read(self, name: str) -> Tensor:
        return self._files.read(name)

    def repeats(self, name: str, of: str) -> bool:
        """Whether there is a tensor `name`, and it is a copy of `of`."""
        return name in self.tensors and self._files.is_copy(name, of)


class MegatronSource:
    """A Megatron directory, converted as it is read; holds the tensors of one parameter."""

    def __init__(self, stored: MegatronTensors, skeleton: Skeleton, *, ignored: str | None = None) -> None:
        """ValueError where a tensor is missing, of another shape, or not implied by the config.

        ignored: how the keys begin of what is there and not wanted.
        """
        self._skeleton = skeleton
        self._stored = stored
        if ignored is not None:
            self._stored.tensors = {k: v for k, v in self._stored.tensors.items() if not k.startswith(ignored)}
        _require_fit(self._stored, skeleton)
        self._merged: dict[str, Tensor] = {}
        self.tensors = {
            name: TensorInfo(self._stored.dtype(slot.keys[0]), tuple(tensor.shape), slot.rule.keeps_dtype)
            for slot in skeleton.slots
            for name, tensor in slot.hf_tensors(slot.empty).items()
        }

    def read(self, name: str) -> Tensor:
        """The tensor; its parameter's others are kept until they are read, or another parameter is."""
        if name not in self._merged:
            self._merged = {}
            slot = self._skeleton.slot_of[name]
            self._merged = slot.hf_tensors(slot.from_pieces(self._stored.read))
        return self._merged.pop(name)


def open_source(path: str, config_from: str, *, allow_pickle: bool = False) -> Source:
    """Either kind of directory; its config.json is in the directory `config_from`, mostly the same.

    Raises ValueError where it is neither, or does not fit its config.
    """
    hf = read_hf_config(config_from, "DIR")
    if is_megatron_directory(path):
        stored = MegatronTensors(path)
        return MegatronSource(stored, build_skeleton(stored_mtp(hf, stored.tensors)))
    source = HFSource(path, allow_pickle=allow_pickle)
    if hf.tied_embeddings and source.repeats("lm_head.weight", "model.embed_tokens.weight"):
        source.tensors.pop("lm_head.weight")  # some save it; it is no tensor of its own
    return source


def require_complete(tensors: HFTensors, skeleton: Skeleton, dropped: HFConfig | None = None) -> None:
    """Every tensor of a Hugging Face directory is there, fits and has a rule, by headers alone. Else ValueError.

    dropped: the shape with what is there and not converted.
    """
    for slot in skeleton.slots:
        try:
            slot.value([_on_meta(tensors, name, slot) for name in slot.hf_names])
        except ValueError as error:
            files = {tensors.file_of(name) for name in slot.hf_names}
            raise ValueError(f"{tensors.path} ({', '.join(sorted(files))}): {error}") from error
    hf = dropped or skeleton.hf
    tensors.require_no_others(family_of(hf).hf_names(hf))


def _on_meta(tensors: HFTensors, name: str, slot: Slot) -> Tensor:
    return torch.empty(tensors.shape(name), dtype=tensors.dtype(name), device=slot.empty.device)


def _require_fit(stored: MegatronTensors, skeleton: Skeleton) -> None:
    path = stored.path
    for piece in (piece for slot in skeleton.slots for piece in slot.pieces(slot.empty)):
        found = stored.tensors.get(piece.key)
        if not isinstance(found, TensorStorageMetadata):
            raise ValueError(f"{path} lacks the tensor {piece.key}, which its config.json implies")
        size, wanted = tuple(found.size), piece.global_shape
        fits = size == wanted or (piece.may_mismatch and size[0] >= wanted[0] and size[1:] == wanted[1:])
        if not fits:
            raise ValueError(f"{path}: {piece.key} has the shape {size} where its config.json implies {wanted}")
    others = sorted(stored.tensors.keys() - {key for slot in skeleton.slots for key in slot.keys})
    if others:
        raise ValueError(
            f"{path} holds {len(others)} tensors that its config.json does not imply ({', '.join(others[:3])}); "
            "check num_hidden_layers"
        )
