"""Moments and whitening where naive formulas lose every digit."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from megatron_rpp.algorithm.masked import global_moments, masked_sum, whiten


def one_rank(x: Tensor) -> Tensor:
    return x


def whitened(x: Tensor, mask: Tensor) -> Tensor:
    _, mean, variance = global_moments(x, mask, one_rank)
    return whiten(x, mask, mean, variance)


def random_batch(mean: float, sd: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    x = (mean + sd * torch.randn(16, 50, generator=g, dtype=torch.float64)).to(dtype)
    return x, (torch.rand(16, 50, generator=g) < 0.6).float()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("mean", "sd"), [(0.0, 1.0), (10.0, 1e-3), (1.0, 1e-4), (1e3, 1e-3), (-1e6, 1e2)])
def test_whitening_with_a_huge_offset_equals_exact_arithmetic(mean: float, sd: float, dtype: torch.dtype) -> None:
    """E[x^2] - E[x]^2 gives std 10.0 in place of 1 for mean 10, sd 1e-3 (seen in a peer)."""
    x, mask = random_batch(mean, sd, dtype)
    values = x.double()[mask != 0].tolist()  # statistics computes with exact fractions
    exact_mean, exact_variance = statistics.mean(values), statistics.pvariance(values)
    count, found_mean, found_variance = global_moments(x, mask, one_rank)
    assert count.item() == len(values)
    assert found_mean.item() == pytest.approx(exact_mean, rel=1e-14, abs=1e-14)
    assert found_variance.item() == pytest.approx(exact_variance, rel=1e-8)
    scale = max(exact_variance, 1e-8) ** 0.5
    expected = [(v - exact_mean) / scale for v in values]
    assert whitened(x, mask)[mask != 0].tolist() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("value", [0.7, -0.37, 1.7, 0.0, 1e3])
def test_constant_values_whiten_to_zero_not_nan(value: float, dtype: torch.dtype) -> None:
    x, mask = torch.full((7, 9), value, dtype=dtype), torch.ones(7, 9)
    assert whitened(x, mask).abs().max().item() < 1e-8


def test_variance_floor_is_a_clamp_not_an_added_term() -> None:
    """sd = 2e-4: (x - mean) / sd is +-1 exactly; with + 1e-8 under the root it would be +-0.89."""
    x, mask = torch.tensor([[2e-4, -2e-4]], dtype=torch.float64), torch.ones(1, 2)
    assert whitened(x, mask)[0].tolist() == pytest.approx([1.0, -1.0])


def test_below_the_variance_floor_values_are_divided_by_1e_minus_4() -> None:
    x, mask = torch.tensor([[1e-6, -1e-6]], dtype=torch.float64), torch.ones(1, 2)
    assert whitened(x, mask)[0].tolist() == pytest.approx([1e-2, -1e-2])


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_junk_outside_the_mask_changes_nothing(junk: float) -> None:
    x, mask = random_batch(1.0, 2.0, torch.float64)
    dirty = torch.where(mask != 0, x, junk)
    assert torch.equal(masked_sum(dirty, mask), masked_sum(x, mask))
    assert torch.equal(whitened(dirty, mask), whitened(x, mask))
    assert (whitened(dirty, mask)[mask == 0] == 0).all()


def test_an_empty_global_batch_has_zero_moments_not_nan() -> None:
    moments = global_moments(torch.full((2, 3), torch.nan), torch.zeros(2, 3), one_rank)
    assert [m.item() for m in moments] == [0.0, 0.0, 0.0]


def test_a_rank_without_tokens_still_joins_both_all_reduces() -> None:
    """Skipping one is a hang on every other rank."""
    calls: list[list[float]] = []

    def reduce_sum(x: Tensor) -> Tensor:
        calls.append(x.tolist())
        return x

    global_moments(torch.ones(2, 3), torch.zeros(2, 3), reduce_sum)
    assert calls == [[0.0, 0.0], [0.0]]
