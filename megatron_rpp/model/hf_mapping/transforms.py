"""How one Megatron parameter is made of Hugging Face tensors, and back, at any tensor-parallel size.

A transform knows two directions. `split` takes the full HF tensors and gives one TP rank's shard;
`merge` takes every rank's shard and gives the full HF tensors. `dim` is the dimension that Megatron
splits over TP ranks, None where every rank holds the whole parameter. `split` slices before it copies:
its inputs are memory-mapped, and a rank should read only its own part of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
        return [shards[0] if dim is None else _joined(shards, dim)]


@dataclass(frozen=True)
class Vocab:
    """A [V, H] tensor, padded with zero rows to what the TP ranks share evenly."""

    def split(self, hf: Sequence[Tensor], shard: Shard, model: HFConfig) -> Tensor:
        (full,) = hf
        _require_rows(hf, [model.vocab_size])
        first = shard.rows * shard.tp_rank
        own = full[first : first + shard.rows]
        if own.shape[0] == shard.rows:
            return own
        return torch.cat([own, full.new_zeros(shard.rows - own.shape[0], full.shape[1])])

    def merge(self, shards: Sequence[Tensor], dim: int | None, model: HFConfig) -> list[Tensor]:
        return [_joined(shards)[: model.vocab_size]]


@dataclass(frozen=True)
class GateUp:
    """gate [F, H] and up [F, H]; each TP rank holds [its gate rows; its up rows]."""

    of: Literal["dense", "expert", "shared"] = "dense"  # which MLP's width F is

    def split(self, hf: Sequence[Tensor], shard: Shard, model: HFConfig) -> Tensor:
        _require_rows(hf, [self._width(model)] * 2)
        return torch.cat([shard.of(part) for part in hf])

    def merge(self, shards: Sequence[Tensor], dim: int | None, model: HFConfig) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [_joined([half[part] for half in halves]) for part in (0, 1)]

    def _width(self, model: HFConfig) -> int:
        if self.of == "dense":
            return model.ffn_hidden_size
        assert model.moe is not None
        return model.moe.ffn_hidden_size if self.of == "expert" else model.moe.shared_ffn_hidden_size


@dataclass(frozen=True)
class MergedGateUp:
    """One HF tensor [2 F, H], gate above up; each TP rank holds [its gate rows; its up rows]."""

    def split(self, hf: Sequence[Tensor], shard: Shard, model: HFConfig) -> Tensor:
        (full,) = hf
        _require_rows(hf, [2 * model.ffn_hidden_size])
        return GateUp().split(full.chunk(2), shard, model)

    def merge(self, shards: Sequence[Tensor], dim: int | None, model: HFConfig) -> list[Tensor]:
        return [torch.cat(GateUp().merge(shards, dim, model))]


@dataclass(frozen=True)
class QKV:
    """q, k and v (weights [rows, H] or biases [rows]), interleaved per query group: q q k v, q q k v, ..."""

    def split(self, hf: Sequence[Tensor], shard: Shard, model: HFConfig) -> Tensor:
        keys = model.num_query_groups * model.head_dim
        _require_rows(hf, [model.num_attention_heads * model.head_dim, keys, keys])
        per_group = [shard.of(part.unflatten(0, (model.num_query_groups, -1))) for part in hf]
        return torch.cat(per_group, dim=1).flatten(0, 1)

    def merge(self, shards: Sequence[Tensor], dim: int | None, model: HFConfig) -> list[Tensor]:
        queries = model.num_attention_heads // model.num_query_groups * model.head_dim
        per_group = _joined(shards).unflatten(0, (model.num_query_groups, -1))
        parts = per_group.split([queries, model.head_dim, model.head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """All of them in one; not copied where they lie end to end already, as `gather_shards` gives them."""
    first = parts[0]
    if dim == 0 and all(
        part.is_contiguous()
        and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.storage_offset() == first.storage_offset() + i * first.numel()
        and part.shape == first.shape
        for i, part in enumerate(parts)
    ):
        return first.as_strided((len(parts) * first.shape[0], *first.shape[1:]), first.stride())
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _require_rows(hf: Sequence[Tensor], wanted: Sequence[int]) -> None:
    """Wrong parts can add up to a right whole, so each is checked."""
    found = [part.shape[0] for part in hf]
    if found != list(wanted):
        raise ValueError(f"{found} rows where config.json implies {list(wanted)}")


@dataclass(frozen=True)
class Copied:
    """`count` HF tensors that are all the same one, which is transformed as `of` does."""

    of: Vocab
    count: int

    def split(self, hf: Sequence[Tensor], shard: Shard, model: HFConfig) -> Tensor:
        first, *copies = hf
        for number, copy in enumerate(copies, start=2):
            if copy.shape != first.shape or not (first.is_meta or torch.equal(copy.to(first.dtype), first)):
                raise ValueError(
                    f"number {number} of them must be a copy of the first, and differs (drop the MTP layers: mtp=drop)"
                )
        return self.of.split([first], shard, model)

    def merge(self, shards: Sequence[Tensor], dim: int | None, model: HFConfig) -> list[Tensor]:
        return self.of.merge(shards, dim, model) * self.count


Transform = Direct | Vocab | GateUp | MergedGateUp | QKV | Copied
