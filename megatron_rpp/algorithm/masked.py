"""Masked sums and moments: pure local math, then one all-reduce a pass, then pure whitening."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ReduceSum = Callable[[Tensor], Tensor]
"""All-reduce (sum) of a tensor over every rank that shares the global batch; identity on one rank."""

MIN_VARIANCE = 1e-8


@dataclass(frozen=True)
class Moments:
    """Count, mean and population variance over the global batch, float64.

    The mean is kept as `center + offset`: `(x - center) - offset` keeps every digit of a deviation that is
    much smaller than the mean, and does not depend on how the batch was split over ranks.
    """

    count: Tensor
    center: Tensor  # the mean as the first pass rounds it
    offset: Tensor  # what the second pass finds missing
    variance: Tensor

    @property
    def mean(self) -> Tensor:
        return self.center + self.offset

    def deviation(self, x: Tensor) -> Tensor:
        """x - mean."""
        return (x.double() - self.center) - self.offset


def two_pass_moments(
    x: Tensor,
    count: Tensor,
    total: Callable[[Tensor], Tensor],
    spread: Callable[[Tensor], Tensor],
    reduce_sum: ReduceSum,
) -> Moments:
    """Moments by the corrected two-pass algorithm (Chan, Golub, LeVeque 1983), one all-reduce a pass.

    E[x^2] - E[x]^2 would lose every digit where the mean is large.

    Args:
        x: values, float64.
        count: how many of them there are here, in one cell or one a group; float64.
        total: local sum of values shaped like x, into one cell or one a group.
        spread: cells back to the values that they belong to.
    """
    count, first = reduce_sum(torch.stack([count, total(x)]))
    divisor = count.clamp(min=1.0)
    center = first / divisor
    deviation = x - spread(center)
    rest, squares = reduce_sum(torch.stack([total(deviation), total(deviation.square())]))
    offset = rest / divisor
    variance = (squares / divisor - offset.square()).clamp(min=0.0)
    return Moments(count, center, offset, variance)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x [B, S] where mask [B, S] is 1, as a scalar; masked entries may be anything, even NaN."""
    return x.masked_fill(mask == 0, 0.0).sum()


def global_moments(x: Tensor, mask: Tensor, reduce_sum: ReduceSum) -> Moments:
    """Moments of masked x [B, S] over the global batch, scalars. A rank with an empty mask takes part with zeros."""
    count = (mask != 0).sum().double()
    return two_pass_moments(x.double(), count, lambda v: masked_sum(v, mask), lambda cell: cell, reduce_sum)


def whiten(x: Tensor, mask: Tensor, moments: Moments, *, ddof: int = 0, floor: str = "clamp") -> Tensor:
    """(x - mean) / standard deviation in float64, [B, S], 0 where mask is 0.

    Args:
        ddof: squares are divided by count - ddof.
        floor: what keeps the root above 0: `clamp`, max(variance, 1e-8), or `add`, variance + 1e-8.
    """
    variance = moments.variance * moments.count / (moments.count - ddof).clamp(min=1.0)
    floored = variance.clamp(min=MIN_VARIANCE) if floor == "clamp" else variance + MIN_VARIANCE
    return (moments.deviation(x) / floored.sqrt()).masked_fill(mask == 0, 0.0)
