"""Reward shaping and the adaptive KL controller on numbers worked by hand."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rpp.algorithm.masked import ReduceSum
from megatron_rpp.algorithm.shaping import (
    RunningMoments,
    adapted_kl_coef,
    group_normalized,
    reward_moments,
    soft_overlong_penalty,
)
from tests.unit.algorithm.cases import Ranks, one_rank


def test_soft_overlong_penalty_grows_over_the_buffer_alone() -> None:
    """At most 20 tokens, the last 8 cost: 0 up to 12, half at 16, all at 20, and never more."""
    lengths = torch.tensor([0, 12, 13, 16, 20, 25])
    found = soft_overlong_penalty(lengths, max_tokens=20, buffer_tokens=8, penalty=2.0)
    assert found.tolist() == [0, 0, -0.25, -1, -2, -2]
    assert found.dtype == torch.float64


def test_soft_overlong_penalty_with_a_buffer_as_long_as_the_response_and_without_one() -> None:
    lengths = torch.tensor([0, 1, 4])
    assert soft_overlong_penalty(lengths, max_tokens=4, buffer_tokens=4, penalty=1.0).tolist() == [0, -0.25, -1]
    assert soft_overlong_penalty(lengths, max_tokens=4, buffer_tokens=0, penalty=1.0).tolist() == [0, 0, 0]
    assert soft_overlong_penalty(lengths, max_tokens=4, buffer_tokens=2, penalty=0.0).tolist() == [0, 0, 0]


def test_running_moments_of_two_worked_batches() -> None:
    """1, 3, then 8: mean 4, squares 9 + 1 + 16; normalized by sqrt(26 / 3)."""
    state = RunningMoments()
    for batch in ([1.0, 3.0], [8.0]):
        state = state.merged(reward_moments(torch.tensor(batch), one_rank))
    assert (state.count, state.mean, state.squares) == pytest.approx((3, 4, 26), rel=1e-15)
    found = state.normalize(torch.tensor([8.0, 4.0]))
    assert found.tolist() == pytest.approx([4 / (26 / 3) ** 0.5, 0], rel=1e-15)


@settings(max_examples=40, deadline=None)
@given(
    batches=st.lists(st.lists(st.floats(-5, 5), max_size=6), min_size=1, max_size=5),
    offset=st.sampled_from([0.0, 1e3, -1e6]),
)
def test_running_moments_equal_those_of_all_batches_joined(batches: list[list[float]], offset: float) -> None:
    """In any number of batches, empty ones too; summing squares would lose the variance at a mean of 1e6."""
    state = RunningMoments()
    for batch in batches:
        state = state.merged(reward_moments(torch.tensor(batch, dtype=torch.float64) + offset, one_rank))
    joined = [value + offset for batch in batches for value in batch]
    assert state.count == len(joined)
    if joined:
        assert state.mean == pytest.approx(statistics.mean(joined), rel=1e-14, abs=1e-14)
        exact = statistics.pvariance(joined) * len(joined)
        assert state.squares == pytest.approx(exact, rel=1e-9, abs=1e-9 * max(1.0, abs(offset) * 1e-6))


def test_equal_rewards_normalize_to_zero_and_a_tiny_deviation_is_floored() -> None:
    """0.7 three times; then deviation 1e-6 is taken as 1e-4."""
    rewards = torch.full((3,), 0.7, dtype=torch.float64)
    state = RunningMoments().merged(reward_moments(rewards, one_rank))
    assert state.normalize(rewards).abs().max().item() < 1e-11
    state = RunningMoments(count=4, mean=1.0, squares=4e-12)
    assert state.normalize(torch.tensor([1.0 + 1e-6], dtype=torch.float64)).item() == pytest.approx(1e-2, rel=1e-9)


def test_an_empty_batch_leaves_the_running_moments_and_a_new_state_too() -> None:
    state = RunningMoments(count=2, mean=1.0, squares=3.0)
    empty = reward_moments(torch.zeros(0), one_rank)
    assert state.merged(empty) == state
    assert RunningMoments().merged(empty) == RunningMoments()


def test_reward_moments_are_those_of_all_ranks() -> None:
    """1, 3 | nothing | 8 on three ranks: mean 4 and variance 26 / 3 on each."""
    parts = [torch.tensor([1.0, 3.0]), torch.zeros(0), torch.tensor([8.0])]

    def work(rank: int, reduce_sum: ReduceSum) -> tuple[float, float, float]:
        found = reward_moments(parts[rank], reduce_sum)
        return found.count.item(), found.mean.item(), found.variance.item()

    ranks = Ranks(3)
    assert ranks.run(work) == [pytest.approx((3, 4, 26 / 3), rel=1e-15)] * 3
    assert ranks.calls[0] == ranks.calls[1] == ranks.calls[2]


def test_group_normalization_is_within_each_prompt() -> None:
    """Groups 1, 3 (mean 2, deviation 1), 5, 5 (no deviation) and 9 alone."""
    rewards = torch.tensor([1.0, 5.0, 9.0, 3.0, 5.0])
    found = group_normalized(rewards, torch.tensor([2, 0, 7, 2, 0]), one_rank)
    assert found.tolist() == [-1, 0, 0, 1, 0]


def test_group_normalization_is_the_same_however_a_prompt_is_spread() -> None:
    rewards, ids = torch.tensor([1.0, 5.0, 9.0, 3.0, 5.5]), torch.tensor([2, 0, 7, 2, 0])
    cuts = [slice(0, 2), slice(2, 2), slice(2, 5)]

    def work(rank: int, reduce_sum: ReduceSum) -> torch.Tensor:
        return group_normalized(rewards[cuts[rank]], ids[cuts[rank]], reduce_sum)

    found = torch.cat(Ranks(3).run(work))
    torch.testing.assert_close(found, group_normalized(rewards, ids, one_rank), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("mean_kl", "expected"),
    [
        (6.0, 0.01),  # on target
        (6.6, 0.01 * (1 + 0.1 * 256 / 1000)),  # 10 % above: a little more penalty
        (5.4, 0.01 * (1 - 0.1 * 256 / 1000)),
        (7.2, 0.01 * (1 + 0.2 * 256 / 1000)),  # 20 %, the most that counts
        (600.0, 0.01 * (1 + 0.2 * 256 / 1000)),
        (0.0, 0.01 * (1 - 0.2 * 256 / 1000)),
        (-3.0, 0.01 * (1 - 0.2 * 256 / 1000)),  # a k1 estimate can be negative
    ],
)
def test_the_adaptive_controller_moves_towards_its_target_within_bounds(mean_kl: float, expected: float) -> None:
    found = adapted_kl_coef(0.01, mean_kl, target=6.0, horizon=1000, responses=256)
    assert found == pytest.approx(expected, rel=1e-14)


def test_a_target_of_zero_leaves_the_coefficient() -> None:
    """Not a division by zero."""
    assert adapted_kl_coef(0.01, 5.0, target=0.0, horizon=1000, responses=256) == 0.01


@settings(max_examples=100)
@given(mean_kl=st.floats(-1e6, 1e6), responses=st.floats(1, 5000), steps=st.integers(1, 50))
def test_the_adaptive_coefficient_stays_positive_over_many_batches(
    mean_kl: float, responses: float, steps: int
) -> None:
    """With batches up to the horizon: a negative one would reward distance from the reference."""
    kl_coef = 0.01
    for _ in range(steps):
        kl_coef = adapted_kl_coef(kl_coef, mean_kl, target=0.1, horizon=5000, responses=responses)
        assert 0 < kl_coef < float("inf")


def test_kl_coef_stays_positive_where_a_batch_is_longer_than_the_horizon() -> None:
    assert adapted_kl_coef(0.01, 0.0, target=0.1, horizon=100, responses=1024) == pytest.approx(0.008)
