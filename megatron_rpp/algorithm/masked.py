"""Masked sums and moments: pure local math, then one all-reduce, then pure whitening."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ReduceSum = Callable[[Tensor], Tensor]
"""All-reduce (sum) of a tensor over every rank that shares the global batch; identity on one rank."""


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x [B, S] where mask [B, S] is 1, as a scalar; masked entries may be anything, even NaN."""
    return x.masked_fill(mask == 0, 0.0).sum()


def global_moments(x: Tensor, mask: Tensor, reduce_sum: ReduceSum) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, population variance) of masked x over the global batch, float64 scalars.

    Two passes, one all-reduce each: E[x^2] - E[x]^2 loses every digit where the mean is large.
    A rank whose mask is empty takes part with zeros.
    """
    x = x.double()
    count, total = reduce_sum(torch.stack([mask.double().sum(), masked_sum(x, mask)]))
    mean = total / count.clamp(min=1.0)
    squares = reduce_sum(masked_sum((x - mean) ** 2, mask)[None])[0]
    return count, mean, squares / count.clamp(min=1.0)


def whiten(x: Tensor, mask: Tensor, mean: Tensor, variance: Tensor, min_variance: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(max(variance, min_variance)) in float64, [B, S], 0 where mask is 0."""
    scaled = (x.double() - mean) / variance.clamp(min=min_variance).sqrt()
    return scaled.masked_fill(mask == 0, 0.0)
