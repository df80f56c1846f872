"""Moments and whitening where naive formulas lose every digit."""

from __future__ import annotations

import statistics
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from megatron_rpp.algorithm.masked import global_moments, masked_sum, whiten
from tests.unit.algorithm.cases import one_rank


def whitened(x: Tensor, mask: Tensor, ddof: int = 0, floor: str = "clamp") -> Tensor:
    return whiten(x, mask, global_moments(x, mask, one_rank), ddof=ddof, floor=floor)


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
    moments = global_moments(x, mask, one_rank)
    assert moments.count.item() == len(values)
    assert moments.mean.item() == pytest.approx(exact_mean, rel=1e-14, abs=1e-14)
    assert moments.variance.item() == pytest.approx(exact_variance, rel=1e-12)
    scale = max(exact_variance, 1e-8) ** 0.5
    exact = [Fraction(v) - sum(map(Fraction, values)) / len(values) for v in values]
    expected = [float(deviation) / scale for deviation in exact]
    assert whitened(x, mask)[mask != 0].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("value", [0.7, -0.37, 1.7, 0.0, 1e3])
def test_constant_values_whiten_to_zero_not_nan(value: float, dtype: torch.dtype) -> None:
    x, mask = torch.full((7, 9), value, dtype=dtype), torch.ones(7, 9)
    assert whitened(x, mask).abs().max().item() < 1e-8


@pytest.mark.parametrize(
    ("ddof", "floor", "expected"),
    [
        (0, "clamp", 1.0),  # sqrt(4e-8 / max(4e-8, 1e-8))
        (0, "add", 2 / 5**0.5),  # sqrt(4e-8 / (4e-8 + 1e-8))
        (1, "clamp", 0.5**0.5),  # variance 2 x 4e-8
        (1, "add", 2 / 3),  # sqrt(4e-8 / (8e-8 + 1e-8))
    ],
)
def test_degrees_of_freedom_and_floor_on_two_values_near_the_floor(ddof: int, floor: str, expected: float) -> None:
    """+-2e-4: each of the four combinations divides by another number."""
    x, mask = torch.tensor([[2e-4, -2e-4]], dtype=torch.float64), torch.ones(1, 2)
    assert whitened(x, mask, ddof, floor)[0].tolist() == pytest.approx([expected, -expected], rel=1e-12)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("floor", ["clamp", "add"])
def test_a_single_token_whitens_to_zero_also_with_bessels_correction(ddof: int, floor: str) -> None:
    """0 / (1 - 1) would be NaN."""
    x, mask = torch.tensor([[3.0, 7.0]], dtype=torch.float64), torch.tensor([[0.0, 1.0]])
    assert whitened(x, mask, ddof, floor)[0].tolist() == [0.0, 0.0]


def test_deviations_are_corrected_for_the_rounding_of_the_mean() -> None:
    """Three values 1e8 + 0, 1/3, 2/3: the rounded mean is off by 1e-8; the deviations must still sum to 0."""
    x = (1e8 + torch.arange(3, dtype=torch.float64) / 3)[None]
    moments = global_moments(x, torch.ones(1, 3), one_rank)
    assert moments.offset.item() != 0, "the case must round its mean to prove anything"
    exact = [Fraction(v) - sum(map(Fraction, x[0].tolist())) / 3 for v in x[0].tolist()]
    assert moments.deviation(x)[0].tolist() == pytest.approx([float(d) for d in exact], rel=1e-14)


def test_whitening_where_the_mean_is_no_floating_point_number() -> None:
    """1e16 and 1e16 + 2: the mean between them rounds to 1e16; uncorrected they would be 0 and 1.41."""
    x = torch.tensor([[1e16, 1e16 + 2]], dtype=torch.float64)
    assert whitened(x, torch.ones(1, 2))[0].tolist() == [-1.0, 1.0]


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
    assert [m.item() for m in (moments.count, moments.mean, moments.variance)] == [0.0, 0.0, 0.0]


def test_a_rank_without_tokens_still_joins_both_all_reduces() -> None:
    """Skipping one is a hang on every other rank."""
    calls: list[list[float]] = []

    def reduce_sum(x: Tensor) -> Tensor:
        calls.append(x.tolist())
        return x

    global_moments(torch.ones(2, 3), torch.zeros(2, 3), reduce_sum)
    assert calls == [[0.0, 0.0], [0.0, 0.0]]
