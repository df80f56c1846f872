"""How one Megatron parameter is made of Hugging Face tensors, and back, at any tensor-parallel size.

A transform knows two directions. `split` takes the full HF tensors and gives one TP rank's shard;
`merge` takes every rank's shard and gives the full HF tensors. `dim` is the dimension that Megatron
splits over TP ranks, None where every rank holds the whole parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpp.model.hf_config import HFConfig


@dataclass(frozen=True)
class Shard:
    """Which part of a parameter one TP rank holds."""

    dim: int | None  # the dimension split over TP ranks; None: every rank holds it whole
    tp_rank: int
    tp_size: int
    rows: int  # of this rank's shard

    def of(self, full: Tensor) -> Tensor:
        """This rank's even share of `full` along `dim`."""
        assert self.dim is not None
        return full.chunk(self.tp_size, self.dim)[self.tp_rank]


@dataclass(frozen=True)
class Direct:
    """One HF tensor, as it is."""

    def split(self, hf: Sequence[Tensor], shard: Shard, model: HFConfig) -> Tensor:
        (full,) = hf
        return full if shard.dim is None else shard.of(full)

    def merge(self, shards: Sequence[Tensor], dim: int | None, model: HFConfig) -> list[Tensor]:
        return [shards[0] if dim is None else torch.cat(list(shards), dim)]


@dataclass(frozen=True)
class Vocab:
    """A [V, H] tensor, padded with zero rows to what the TP ranks share evenly."""

    def split(self, hf: Sequence[Tensor], shard: Shard, model: HFConfig) -> Tensor:
        (full,) = hf
        _require_rows(hf, [model.vocab_size])
        padding = full.new_zeros(shard.rows * shard.tp_size - full.shape[0], full.shape[1])
        return shard.of(torch.cat([full, padding]))

    def merge(self, shards: Sequence[Tensor], dim: int | None, model: HFConfig) -> list[Tensor]:
        return [torch.cat(list(shards))[: model.vocab_size]]


@dataclass(frozen=True)
class GateUp:
    """gate [F, H] and up [F, H]; each TP rank holds [its gate rows; its up rows]."""

    def split(self, hf: Sequence[Tensor], shard: Shard, model: HFConfig) -> Tensor:
        _require_rows(hf, [model.ffn_hidden_size] * 2)
        return torch.cat([shard.of(part) for part in hf])

    def merge(self, shards: Sequence[Tensor], dim: int | None, model: HFConfig) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[part] for half in halves]) for part in (0, 1)]


@dataclass(frozen=True)
class QKV:
    """q, k and v (weights [rows, H] or biases [rows]), interleaved per query group: q q k v, q q k v, ..."""

    def split(self, hf: Sequence[Tensor], shard: Shard, model: HFConfig) -> Tensor:
        keys = model.num_query_groups * model.head_dim
        _require_rows(hf, [model.num_attention_heads * model.head_dim, keys, keys])
        per_group = [part.unflatten(0, (model.num_query_groups, -1)) for part in hf]
        return shard.of(torch.cat(per_group, dim=1)).flatten(0, 1)

    def merge(self, shards: Sequence[Tensor], dim: int | None, model: HFConfig) -> list[Tensor]:
        queries = model.num_attention_heads // model.num_query_groups * model.head_dim
        per_group = torch.cat(list(shards)).unflatten(0, (model.num_query_groups, -1))
        parts = per_group.split([queries, model.head_dim, model.head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]


def _require_rows(hf: Sequence[Tensor], wanted: Sequence[int]) -> None:
    """Wrong parts can add up to a right whole, so each is checked."""
    found = [part.shape[0] for part in hf]
    if found != list(wanted):
        raise ValueError(f"{found} rows where config.json implies {list(wanted)}")


Transform = Direct | Vocab | GateUp | QKV
