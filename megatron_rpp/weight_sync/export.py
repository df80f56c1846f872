"""HF-named tensors in flat buckets of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpp.device import dtype_name


@dataclass(frozen=True)
class Bucket:
    """Several tensors laid end to end, in the byte order of SGLang's `flattened_bucket` load format."""

    names: list[str]
    dtypes: list[str]  # such as "float32"
    shapes: list[list[int]]
    flat: Tensor  # [bytes] uint8


def buckets(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[Bucket]:
    """Group tensors in order into buckets of at most `max_bytes`; a larger tensor gets its own.

    A bucket has one dtype: SGLang refuses a tensor that does not start at a multiple of its item size.
    """
    pending: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if pending and (size + tensor.nbytes > max_bytes or tensor.dtype != pending[0][1].dtype):
            yield _flatten(pending)
            pending, size = [], 0
        pending.append((name, tensor))
        size += tensor.nbytes
    if pending:
        yield _flatten(pending)


def _flatten(tensors: list[tuple[str, Tensor]]) -> Bucket:
    return Bucket(
        names=[name for name, _ in tensors],
        dtypes=[dtype_name(t.dtype) for _, t in tensors],
        shapes=[list(t.shape) for _, t in tensors],
        flat=torch.cat([t.contiguous().flatten().view(torch.uint8) for _, t in tensors]),
    )
