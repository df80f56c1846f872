"""HF-named tensors in flat buckets, planned before the first gather so that memory stays bounded.

One bucket is in flight while the next is filled, and filling it gathers one parameter at a time. All of
that together stays within two times weight_sync.bucket_mb, or of the largest tensor if that is larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_rpp.device import dtype_name
from megatron_rpp.model.export_hf import entries_of
from megatron_rpp.model.hf_io.safetensors_writer import Entry
from megatron_rpp.model.shards import sharded_parameters
from megatron_rpp.model.stage_export import NamedTensor, StageExport

# SGLang's DeepSeek models join these two in one parameter, and forget the first, in silence, if the second does
# not come in the same request.
JOINED, PARTNER = "self_attn.q_a_proj.", "self_attn.kv_a_proj_with_mqa."


@dataclass(frozen=True)
class Bucket:
    """Several tensors that are sent together.

    Flat, they lie end to end in one buffer, in the byte order of SGLang's `flattened_bucket` load format.
    """

    entries: tuple[Entry, ...]
    parts: tuple[Tensor, ...]  # flat: one, [bytes] uint8; else the tensors themselves
    is_flat: bool
    may_overlap: bool = True  # the next one may be made while this one is sent; not beside an outsize tensor

    @property
    def nbytes(self) -> int:
        return _bytes_of(self.entries)

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.entries]

    @property
    def dtypes(self) -> list[str]:
        """Such as "float32"."""
        return [dtype_name(entry.dtype) for entry in self.entries]

    @property
    def shapes(self) -> list[list[int]]:
        return [list(entry.shape) for entry in self.entries]

    def __str__(self) -> str:
        return self.names[0] if len(self.entries) == 1 else f"{self.names[0]} .. {self.names[-1]}"


def stage_buckets(
    export: StageExport, tensors: Iterator[NamedTensor], bucket_bytes: int, *, flatten: bool
) -> Iterator[Bucket]:
    """`tensors`, those of `export`, in buckets."""
    plan = plan_buckets(entries_of(export.empty()), payload_bytes(export, bucket_bytes, flatten=flatten))
    return fill_buckets(tensors, plan, flatten=flatten)


def payload_bytes(export: StageExport, bucket_bytes: int, *, flatten: bool) -> int:
    """What a bucket may hold so that two of them and the making of one parameter fit into two `bucket_bytes`.

    A gather may hold its parameter twice: its shards, and the tensors merged from them. A conversion or a flat bucket
    has it beside the bucket. What is sent as this rank has it takes nothing more.
    """
    parallel = export.model.parallel
    ranks = max(parallel.tp_size, parallel.etp_size)
    is_as_held = export.dtype in (None, export.model.config.params_dtype) and not flatten
    if ranks == parallel.ep_size == 1 and is_as_held:
        return bucket_bytes
    sizes = (
        item.parameter.nbytes * (1 if item.dim is None else ranks) for item in sharded_parameters(export.model.chunks)
    )
    return max(bucket_bytes - max(sizes, default=0), bucket_bytes // 4)


def plan_buckets(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """`entries` in order in buckets of at most `max_bytes`; a larger tensor goes alone.

    Tensors that SGLang wants in one request stay together (`JOINED`). Within a bucket wider dtypes come
    first: SGLang refuses a tensor that does not start at a multiple of its item size.
    """
    runs: list[list[Entry]] = []
    used, awaited = 0, None
    for entry in entries:
        if not runs or (used + entry.nbytes > max_bytes and awaited is None):
            runs.append([])
            used = 0
        runs[-1].append(entry)
        if JOINED in entry.name:
            awaited = partner_of(entry.name)
        elif entry.name == awaited:
            awaited = None
        used += entry.nbytes
    return [sorted(run, key=lambda entry: -entry.dtype.itemsize) for run in runs]


def partner_of(name: str) -> str:
    """The tensor that must travel with the first one of `JOINED`."""
    return name.replace(JOINED, PARTNER)


def fill_buckets(tensors: Iterator[NamedTensor], plan: Sequence[Sequence[Entry]], *, flatten: bool) -> Iterator[Bucket]:
    """The planned buckets, each yielded as soon as it is full; `tensors` come in the order of the plan's entries.

    Two flat buffers take turns: a bucket is good until the next but one is asked for.
    """
    size = max((_bytes_of(entries) for entries in plan if len(entries) > 1), default=0)
    buffers: list[Tensor] = []
    for entries in plan:
        found = _taken(tensors, entries)
        if not flatten:
            by_name = {name: tensor.contiguous() for name, tensor in found}
            parts = tuple(by_name.pop(entry.name) for entry in entries)
        elif len(entries) == 1:
            parts = tuple(as_bytes(tensor) for _, tensor in found)  # no copy where it lies in one piece
        else:
            parts = (_laid_end_to_end(found, entries, buffers, size),)
            buffers.reverse()
        yield Bucket(tuple(entries), parts, flatten, may_overlap=len(entries) > 1 or entries[0].nbytes <= size)
        del parts
    assert next(tensors, None) is None, "more tensors than planned"


def _taken(tensors: Iterator[NamedTensor], entries: Sequence[Entry]) -> Iterator[NamedTensor]:
    """As many of `tensors` as there are `entries`, which name them in some order."""
    wanted = {entry.name for entry in entries}
    for _ in entries:
        name, tensor = next(tensors)
        assert name in wanted, f"{name} came in the place of {', '.join(sorted(wanted))}"
        wanted.remove(name)
        yield name, tensor
        del tensor  # before the next one is gathered


def _laid_end_to_end(
    tensors: Iterator[NamedTensor], entries: Sequence[Entry], buffers: list[Tensor], size: int
) -> Tensor:
    """`tensors` in the first of `buffers`; makes another where there are not two yet."""
    starts = dict(zip((entry.name for entry in entries), _starts(entries), strict=True))
    flat = None
    for name, tensor in tensors:
        if flat is None:
            if len(buffers) < 2:
                buffers.insert(0, torch.empty(size, dtype=torch.uint8, device=tensor.device))
            flat = buffers[0][: _bytes_of(entries)]
        flat[starts[name] :][: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        del tensor
    assert flat is not None
    return flat


def tensors_of(bucket: Bucket) -> list[NamedTensor]:
    """The tensors of a flat bucket by name, as views of it."""
    (flat,) = bucket.parts
    parts = flat.split([entry.nbytes for entry in bucket.entries])
    return [
        (entry.name, part.view(entry.dtype).view(entry.shape))
        for entry, part in zip(bucket.entries, parts, strict=True)
    ]


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of `tensor`, [n] uint8; a view where it is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _bytes_of(entries: Sequence[Entry]) -> int:
    return sum(entry.nbytes for entry in entries)


def _starts(entries: Sequence[Entry]) -> list[int]:
    return list(accumulate((entry.nbytes for entry in entries[:-1]), initial=0))
