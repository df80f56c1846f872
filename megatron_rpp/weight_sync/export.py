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
    """Several tensors laid end to end, in the byte order of SGLang's `flattened_bucket` load format."""

    entries: tuple[Entry, ...]
    flat: Tensor  # [bytes] uint8
    may_overlap: bool = True  # the next one may be made while this one is sent; not beside an outsize tensor

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


def stage_buckets(export: StageExport, tensors: Iterator[NamedTensor], bucket_bytes: int) -> Iterator[Bucket]:
    """`tensors`, those of `export`, in buckets."""
    return fill_buckets(tensors, plan_buckets(entries_of(export.empty()), payload_bytes(export, bucket_bytes)))


def payload_bytes(export: StageExport, bucket_bytes: int) -> int:
    """What a bucket may hold so that two of them and the gather of one parameter fit into two `bucket_bytes`.

    A gather may hold its parameter twice: its shards, and the tensors merged from them.
    """
    parallel = export.model.parallel
    ranks = max(parallel.tp_size, parallel.etp_size)
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


def fill_buckets(tensors: Iterator[NamedTensor], plan: Sequence[Sequence[Entry]]) -> Iterator[Bucket]:
    """The planned buckets, each yielded as soon as it is full; `tensors` come in the order of the plan's entries.

    Two buffers take turns: a bucket is good until the next but one is asked for.
    """
    buffers: list[Tensor] = []
    size = max((_bytes_of(entries) for entries in plan if len(entries) > 1), default=0)
    for entries in plan:
        if len(entries) == 1:
            name, tensor = next(tensors)
            assert name == entries[0].name, f"{name} came in the place of {entries[0].name}"
            flat = as_bytes(tensor)  # no copy where it lies in one piece
            del tensor
            yield Bucket(tuple(entries), flat, may_overlap=flat.numel() <= size)
        else:
            flat = _filled(tensors, entries, buffers, size)
            yield Bucket(tuple(entries), flat)
            buffers.reverse()
        del flat
    assert next(tensors, None) is None, "more tensors than planned"


def _filled(tensors: Iterator[NamedTensor], entries: Sequence[Entry], buffers: list[Tensor], size: int) -> Tensor:
    """The next tensors in the first of `buffers`; makes another where there are not two yet."""
    starts = dict(zip((entry.name for entry in entries), _starts(entries), strict=True))
    flat = None
    for _ in entries:
        name, tensor = next(tensors)
        if flat is None:
            if len(buffers) < 2:
                buffers.insert(0, torch.empty(size, dtype=torch.uint8, device=tensor.device))
            flat = buffers[0][: _bytes_of(entries)]
        flat[starts[name] :][: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        del tensor  # before the next one is gathered
    assert flat is not None
    return flat


def tensors_of(bucket: Bucket) -> list[NamedTensor]:
    """The bucket's tensors by name, as views of it."""
    parts = bucket.flat.split([entry.nbytes for entry in bucket.entries])
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
