"""Attention over packed sequences, block by block, on one rank or on context-parallel ones.

Shapes: T packed tokens of all CP ranks, C = T / cp_size of this one, H query heads in G groups, D dimensions a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rpp.experience.packing import zigzag

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [1, H, queries, D], k and v [1, G, keys, D] -> [1, H, queries, Dv]; the queries stand at the last of the keys."""


@dataclass
class SlotParams(PackedSeqParams):
    """What the layers of a model are told of slots; Megatron's and Transformer Engine's know Megatron's fields alone.

    Without `bounds` every layer would wait for its device to read the tensor back.
    """

    bounds: tuple[int, ...] = ()  # as cu_seqlens


def slot_params(cu_seqlens: Tensor, bounds: tuple[int, ...]) -> SlotParams:
    """cu_seqlens [slots + 1] int32, and the same as numbers.

    Padding in a slot is part of its sequence: all that attention and rotary embeddings know are slots.
    """
    longest = max(end - start for start, end in pairwise(bounds))
    return SlotParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=bounds,
    )


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], cp_group: ProcessGroup | None, attend: Attend
) -> Tensor:
    """query [C, H, D], key and value [C, G, D] -> [C, H * Dv]. Slot i is packed tokens [bounds[i], bounds[i + 1]).

    Every CP rank is given all keys and values, and attends with its own queries, two chunks of each slot.
    """
    cp_size, cp_rank = (cp_group.size(), cp_group.rank()) if cp_group is not None else (1, 0)
    if cp_group is not None and cp_size > 1:
        key, value = _gather(key, value, bounds, cp_group)
    slots = [end - start for start, end in pairwise(bounds)]
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))  # SDPA wants [B, heads, tokens, D]
    # Split, not sliced: the backward of each slice of a whole would be a whole of zeros.
    q_of, k_of, v_of = (x.split([slot // size for slot in slots], dim=2) for x, size in ((q, cp_size), (k, 1), (v, 1)))
    outputs = [
        attend(q_chunk, k_slot[:, :, :seen], v_slot[:, :, :seen])
        for q_slot, k_slot, v_slot in zip(q_of, k_of, v_of, strict=True)
        for q_chunk, seen in _chunks(q_slot, cp_size, cp_rank)
    ]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1).flatten(1)


def _chunks(q: Tensor, cp_size: int, cp_rank: int) -> list[tuple[Tensor, int]]:
    """(queries, the keys of the slot that the last of them sees) of this rank's chunks of a slot, as `zigzag` deals."""
    if cp_size == 1:
        return [(q, q.shape[2])]
    first, second = q.chunk(2, dim=2)
    length = first.shape[2]
    return [(first, (cp_rank + 1) * length), (second, (2 * cp_size - cp_rank) * length)]


def _gather(key: Tensor, value: Tensor, bounds: tuple[int, ...], cp_group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """[C, G, D] of each rank to [T, G, D] in packed order. The backward sums gradients over ranks."""
    both = torch.cat([key, value], dim=-1)  # one collective
    dealt = gather_from_sequence_parallel_region(both, group=cp_group)
    whole = dealt[_undealt(bounds, cp_group.size(), key.device)]
    return whole[..., : key.shape[-1]], whole[..., key.shape[-1] :]


@lru_cache(maxsize=2)  # it serves all layers of a microbatch
def _undealt(bounds: tuple[int, ...], cp_size: int, device: torch.device) -> Tensor:
    """[T] int64: where each packed token stands among those of all ranks, rank after rank."""
    return zigzag(bounds, cp_size).flatten().argsort().to(device)
