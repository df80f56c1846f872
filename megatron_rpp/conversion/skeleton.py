"""A model without weights: what Megatron would save of it, and which Hugging Face tensors each part is made of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_rpp import device
from megatron_rpp.config.schema import Config, ModelConfig, ParallelConfig
from megatron_rpp.conversion.pieces import Piece
from megatron_rpp.model.build import build_empty
from megatron_rpp.model.hf_config import HFConfig, without_values
from megatron_rpp.model.hf_mapping import family_of
from megatron_rpp.model.hf_mapping.table import Rule
from megatron_rpp.model.hf_mapping.transforms import Shard
from megatron_rpp.model.shards import sharded_parameters
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.environment import find_job

META = torch.device("meta")
LOCAL_SPEC = "local"  # its sharded_state_dict has the keys of Transformer Engine's, and it builds without CUDA
# What Transformer Engine's attention saves beside what local layers save; loaders ask for it by name.
_TE_OBJECT = ("linear_qkv._extra_state", "core_attention._extra_state")


@dataclass(frozen=True)
class Slot:
    """One whole Megatron parameter: its place in a checkpoint, and the HF tensors that it is made of."""

    name: str  # global Megatron name
    shape: torch.Size
    dim: int | None  # which tensor parallelism splits
    rule: Rule
    hf_names: tuple[str, ...]
    hf: HFConfig
    entry: ShardedTensor | ShardedTensorFactory  # without data
    is_expert: bool = False

    def value(self, parts: Sequence[Tensor]) -> Tensor:
        """The parameter [shape] from its HF tensors, given like `hf_names`. ValueError where they do not fit."""
        try:
            value = self.rule.transform.split(parts, Shard(self.dim, 0, 1, self.shape[0]), self.hf)
            if value.shape != self.shape:
                raise ValueError(f"they give {self.name} the shape {tuple(value.shape)}, not {tuple(self.shape)}")
        except (RuntimeError, ValueError) as error:
            found = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(self.hf_names, parts, strict=True))
            raise ValueError(f"{found} do not fit config.json: {error}") from error
        return value

    def hf_tensors(self, value: Tensor) -> dict[str, Tensor]:
        """The HF tensors of the parameter `value` [shape]; views of it where they can be."""
        return dict(zip(self.hf_names, self.rule.transform.merge([value], self.dim, self.hf), strict=True))

    def pieces(self, value: Tensor) -> list[Piece]:
        """`value` [shape] as Megatron stores it: one piece, or gate and up each for themselves. They are views."""
        return [Piece.of(tensor) for tensor in nested_values([self._sharded(value)])]

    def from_pieces(self, read: Any) -> Tensor:
        """The parameter [shape], where read(piece) gives each piece's stored tensor."""
        stored = dict_list_map_outplace(lambda tensor: read(Piece.of(tensor)), self._sharded(self.empty))
        return self.entry.merge_fn(stored) if isinstance(self.entry, ShardedTensorFactory) else stored

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Names in a checkpoint."""
        return tuple(dict.fromkeys(piece.key for piece in self.pieces(self.empty)))

    @property
    def empty(self) -> Tensor:
        return torch.empty(self.shape, device=META)

    def _sharded(self, value: Tensor) -> Any:
        if isinstance(self.entry, ShardedTensorFactory):
            return replace(self.entry, data=value).build()
        return replace(self.entry, data=value, dtype=value.dtype)


@dataclass(frozen=True)
class Skeleton:
    """Everything of a model's checkpoint but the values."""

    hf: HFConfig
    slots: list[Slot]
    objects: list[str]  # keys of `_extra_state` entries, which hold no weights

    @cached_property
    def slot_of(self) -> dict[str, Slot]:
        """By HF name, in the model's order."""
        return {name: slot for slot in self.slots for name in slot.hf_names}


def build_skeleton(hf: HFConfig) -> Skeleton:
    """Build the model of shape `hf` whole (TP 1, PP 1) on the meta device, in a process group of one rank."""
    config = Config(model=ModelConfig(layer_spec=LOCAL_SPEC, vocab_divisor=1))
    with _alone() as parallel, device.without_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron tells of every optional package that is not installed
        (chunk,) = build_empty(without_values(hf), config, parallel, mtp=True).chunks
        state: dict[str, Any] = chunk.sharded_state_dict()  # type: ignore[operator]
        slots, family = [], family_of(hf)
        for item in sharded_parameters([chunk]):
            rule, names = family.find(item.name)
            shape, entry = item.parameter.shape, state.pop(item.name).without_data()
            slots.append(Slot(item.name, shape, item.dim, rule, names, hf, entry, item.is_expert))
    others = [name for name, value in state.items() if not isinstance(value, ShardedObject)]
    assert not others, f"sharded_state_dict has tensors that are no parameters: {others}"
    return Skeleton(hf, slots, _object_keys(state))


def _object_keys(state: dict[str, ShardedObject]) -> list[str]:
    keys = [value.unique_key for value in state.values()]
    return keys + [key.replace(*_TE_OBJECT) for key in keys if _TE_OBJECT[0] in key]


@contextmanager
def _alone() -> Iterator[Any]:
    place = find_job()
    if place is not None and place.world_size != 1:
        raise ValueError("conversion runs as one process; start it without torchrun, mpirun or several srun tasks")
    try:
        yield bootstrap.initialize(ParallelConfig(), seed=0)
    finally:
        bootstrap.shutdown()
