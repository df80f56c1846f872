"""Megatron's parameter and gradient buffers: how long they are, and which part each data-parallel rank updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# `_ParamAndGradBuffer` (0.16) starts each parameter at a multiple of this where the optimizer is distributed,
_PARAMETER_ALIGNMENT = 64
# and ends each bucket at one of this and of the data-parallel size.
_BUCKET_ALIGNMENT = 128


@dataclass(frozen=True)
class Buffer:
    """One buffer of a model chunk. Sizes are elements."""

    length: int  # with padding
    updated: tuple[int, ...]  # by each data-parallel rank


def bucket_elements(replicas: int) -> int:
    """Where gradients are summed while the backward goes on, a bucket ends with the parameter that makes it as long.

    As `DistributedDataParallel` (0.16, 0.19) has it, of experts too; context-parallel ranks do not count.
    """
    return max(40_000_000, 1_000_000 * replicas)


def lay_out(
    sizes: Sequence[int],
    dp_size: int,
    *,
    distributed: bool,
    apart: int | None = None,
    bucket: int | None = None,
) -> Buffer:
    """The buffer of parameters of `sizes`, in the module's order.

    apart: index of a tied embedding that pipeline stages share; Megatron gives it a bucket of its own.
    bucket: `bucket_elements`; None where all gradients are summed at once.
    """
    if not distributed:
        return Buffer(sum(sizes), (sum(sizes),) * dp_size)
    spans: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    start = end = 0  # of the open bucket
    for index in reversed(range(len(sizes))):  # as gradients come
        if index == apart and end > start:
            buckets.append((start, _up(end, math.lcm(dp_size, _BUCKET_ALIGNMENT))))
            start = end = buckets[-1][1]
        first = _up(end, _PARAMETER_ALIGNMENT)
        end = first + sizes[index]
        spans.append((first, end))
        if index == apart or (bucket is not None and end - start >= bucket):
            buckets.append((start, _up(end, math.lcm(dp_size, _BUCKET_ALIGNMENT))))
            start = end = buckets[-1][1]
    if end > start:
        buckets.append((start, _up(end, math.lcm(dp_size, _BUCKET_ALIGNMENT))))
    return Buffer(buckets[-1][1] if buckets else 0, _shares(spans, buckets, dp_size))


def _shares(spans: Sequence[tuple[int, int]], buckets: Sequence[tuple[int, int]], dp_size: int) -> tuple[int, ...]:
    """Elements of parameters, not padding, in each rank's equal part of every bucket."""
    held = [0] * dp_size
    for first, last in buckets:
        part = (last - first) // dp_size
        for start, end in spans:
            if not first <= start < last:
                continue
            while start < end:
                rank = (start - first) // part
                until = min(end, first + (rank + 1) * part)
                held[rank] += until - start
                start = until
    return tuple(held)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
