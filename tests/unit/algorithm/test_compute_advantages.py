"""Advantages: a worked batch, and the same numbers however the batch is spread over ranks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rpp.algorithm.advantages import Advantages, compute_advantages


def test_normalization_is_over_tokens_with_population_variance() -> None:
    """Rewards 1 and 0 on responses of 1 and 3 tokens: mean 1/4, variance 3/16, A = 3/sqrt(3) and -1/sqrt(3).

    Over responses the mean would be 1/2; with ddof 1 the first advantage would be 1.5.
    """
    mask = torch.tensor([[0.0, 1, 0, 0], [0, 1, 1, 1]])
    result = compute_advantages(torch.tensor([1.0, 0.0]), torch.zeros(2, 4), mask, kl_coef=0.0)
    high, low = 3**0.5, -(3**-0.5)
    expected = [0, high, 0, 0, 0, low, low, low]
    assert result.advantages.flatten().tolist() == pytest.approx(expected, abs=1e-12)
    assert result.mean.item() == pytest.approx(0.0, abs=1e-12)
    assert result.std.item() == pytest.approx(1.0, abs=1e-12)


def test_kl_and_gamma_enter_before_the_normalization() -> None:
    """r = -0.2, 1 - 0.4 = 0.6; gamma 0.5: G = 0.1, 0.6; mean 0.35, sd 0.25: A = -1, 1."""
    kl = torch.tensor([[2.0, 4.0]], dtype=torch.float64)
    result = compute_advantages(torch.tensor([1.0]), kl, torch.ones(1, 2), kl_coef=0.1, gamma=0.5)
    assert result.advantages[0].tolist() == pytest.approx([-1.0, 1.0])
    without_kl = compute_advantages(torch.tensor([1.0]), kl, torch.ones(1, 2), kl_coef=0.0)
    assert without_kl.advantages[0].tolist() == pytest.approx([0.0, 0.0])


@pytest.mark.parametrize("reward", [0.7, -0.37, 1.7])
def test_equal_rewards_give_zero_advantages_and_zero_std(reward: float) -> None:
    """Float32 one-pass whitening gives NaN here (seen in a peer)."""
    mask = (torch.arange(11) < torch.tensor([[3], [11], [0], [7]])).float()
    result = compute_advantages(torch.full((4,), reward), torch.zeros(4, 11), mask, kl_coef=0.01)
    assert result.advantages.abs().max().item() < 1e-8
    assert result.mean.abs().item() < 1e-8 and result.std.item() < 1e-8


def test_a_batch_without_any_response_token_gives_zeros() -> None:
    result = compute_advantages(torch.ones(2), torch.full((2, 3), torch.nan), torch.zeros(2, 3), kl_coef=0.1)
    assert (result.advantages == 0).all() and result.mean.item() == 0.0 and result.std.item() == 0.0


def test_reported_std_is_of_the_advantages_and_shows_a_batch_below_the_variance_floor() -> None:
    """Returns +-1e-6 are divided by 1e-4: the standard deviation is 0.01, not its square and not 1."""
    rewards = torch.tensor([1e-6, -1e-6], dtype=torch.float64)
    result = compute_advantages(rewards, torch.zeros(2, 1), torch.ones(2, 1), kl_coef=0.0)
    assert result.std.item() == pytest.approx(1e-2)


class Ranks:
    """`size` threads that all-reduce with one another."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=10)
        self.inbox: list[Tensor | None] = [None] * size

    def reduce_sum(self, rank: int, x: Tensor) -> Tensor:
        self.inbox[rank] = x
        self.barrier.wait()
        total = torch.stack(self.inbox).sum(0)  # type: ignore[arg-type]
        self.barrier.wait()
        return total

    def run(self, batches: list[dict[str, Tensor]], **settings: Any) -> list[Advantages]:
        def one(rank: int) -> Advantages:
            return compute_advantages(**batches[rank], reduce_sum=lambda x: self.reduce_sum(rank, x), **settings)

        with ThreadPoolExecutor(len(batches)) as pool:
            return list(pool.map(one, range(len(batches))))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    cuts=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    offset=st.sampled_from([0.0, 1e3]),
    gamma=st.sampled_from([1.0, 0.9]),
)
def test_any_split_over_ranks_gives_the_advantages_of_one_rank(
    seed: int, cuts: list[int], offset: float, gamma: float
) -> None:
    """Ranks with no rows, or with rows without response tokens, included."""
    g = torch.Generator().manual_seed(seed)
    batch = {
        "rewards": offset + torch.randn(9, generator=g, dtype=torch.float64),
        "kl": torch.randn(9, 6, generator=g, dtype=torch.float64),
        "loss_mask": (torch.rand(9, 6, generator=g) < 0.5).float() * (torch.rand(9, 1, generator=g) < 0.7),
    }
    settings = {"kl_coef": 0.05, "gamma": gamma}
    whole = compute_advantages(**batch, **settings)
    edges = [0, *sorted(cuts), 9]
    pieces = [{k: v[a:b] for k, v in batch.items()} for a, b in pairwise(edges)]
    split = Ranks(len(pieces)).run(pieces, **settings)
    tolerance = 1e-12 * max(1.0, offset)
    difference = torch.cat([r.advantages for r in split]) - whole.advantages
    assert difference.abs().max().item() < tolerance
    for result in split:  # every rank reports the global statistics, not its own
        assert result.mean.item() == pytest.approx(whole.mean.item(), abs=tolerance)
        assert result.std.item() == pytest.approx(whole.std.item(), abs=tolerance)


def test_worked_example_of_the_documentation() -> None:
    """docs/algorithm.md: returns 0.8, 0.8, -0.1; mean 0.5, variance 0.18."""
    result = compute_advantages(
        torch.tensor([1.0, 0.0]),
        torch.tensor([[0.0, 2.0], [1.0, 0.0]]),
        torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
        kl_coef=0.1,
    )
    expected = torch.tensor([[0.3, 0.3], [-0.6, 0.0]], dtype=torch.float64) / 0.18**0.5
    torch.testing.assert_close(result.advantages, expected, rtol=0, atol=1e-8)
