"""Compare two checkpoints tensor by tensor, either of them in either form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpp.conversion.sources import Source
from megatron_rpp.device import dtype_name

SLAB = 1 << 22  # elements that are compared at a time


@dataclass(frozen=True)
class Difference:
    """What is wrong with one tensor."""

    name: str
    what: str


def differences(first: Source, second: Source, atol: float | None) -> Iterator[Difference]:
    """Of every tensor that is not the same in both.

    atol: None asks for the same dtype and bits; else values may differ by this much, and dtypes too.
    """
    for name, info in first.tensors.items():
        if name not in second.tensors:
            yield Difference(name, "missing in the second")
            continue
        other = second.tensors[name]
        if info.shape != other.shape:
            yield Difference(name, f"shape {list(info.shape)} and {list(other.shape)}")
        elif atol is None and info.dtype != other.dtype:
            yield Difference(name, f"{dtype_name(info.dtype)} and {dtype_name(other.dtype)}")
        elif what := _values(first.read(name), second.read(name), atol):
            yield Difference(name, what)
    for name in sorted(second.tensors.keys() - first.tensors.keys()):
        yield Difference(name, "missing in the first")


def _values(first: Tensor, second: Tensor, atol: float | None) -> str:
    """Empty where they are the same."""
    count, largest, total = 0, 0.0, first.numel()
    slabs = zip(first.reshape(-1).split(SLAB), second.reshape(-1).split(SLAB), strict=True)
    for a, b in slabs:
        if atol is None and torch.equal(_bits(a), _bits(b)):
            continue
        distance = (a.double() - b.double()).abs()
        # NaN differs from all but NaN; infinity minus itself is NaN too.
        same = (a == b) | (a.isnan() & b.isnan())
        distance = distance.masked_fill(same, 0.0).nan_to_num(nan=float("inf"))
        count += int((_bits(a) != _bits(b)).sum() if atol is None else (distance > atol).sum())
        largest = max(largest, float(distance.max()))
    if not count:
        return ""
    return f"{count} of {total} values differ, by at most {largest:.3e}"


def _bits(x: Tensor) -> Tensor:
    """As integers of the same width, in which -0 differs from 0 and NaN equals itself."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
