"""Token rewards and returns.

The worked example: five response tokens around one observation token (position 3), R = 1, beta = 0.5,
gamma = 0.5.

    mask     0     1      1     0    1     1    1    0
    kl       9     0.1    0.2   9    0    -0.2  0.4  9
    r_t      0    -0.05  -0.1   0    0     0.1  0.8  0      1 - 0.5 * 0.4 = 0.8 on the last response token
    G_t      0  -0.0375  0.025  0  0.25   0.5   0.8  0      0.1 + 0.8/2; 0 + 0.5/2; -0.1 + 0.25/2; -0.05 + 0.025/2
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.algorithm.returns import discounted_returns, token_rewards

MASK = torch.tensor([[0.0, 1, 1, 0, 1, 1, 1, 0]])
KL = torch.tensor([[9, 0.1, 0.2, 9, 0, -0.2, 0.4, 9]], dtype=torch.float64)
REWARDS = torch.tensor([1.0])
TOKEN_REWARDS = [0, -0.05, -0.1, 0, 0, 0.1, 0.8, 0]
RETURNS = [0, -0.0375, 0.025, 0, 0.25, 0.5, 0.8, 0]


def test_token_rewards_match_the_worked_example() -> None:
    """The reward sits on the last response token, not the last column; no KL at masked tokens."""
    found = token_rewards(REWARDS, KL, MASK, kl_coef=0.5)
    assert found[0].tolist() == pytest.approx(TOKEN_REWARDS, abs=1e-15)


def test_returns_match_the_worked_example() -> None:
    """An observation token in the middle neither resets the return nor decays it."""
    found = discounted_returns(torch.tensor([TOKEN_REWARDS], dtype=torch.float64), MASK, gamma=0.5)
    assert found[0].tolist() == pytest.approx(RETURNS, abs=1e-15)


def test_returns_may_be_discounted_over_every_token() -> None:
    """skip_masked=False: from position 4 to 2 the observation counts: 0.25 / 4 - 0.1 = -0.0375; -0.05 - 0.0375 / 2."""
    rewards = torch.tensor([TOKEN_REWARDS], dtype=torch.float64)
    found = discounted_returns(rewards, MASK, gamma=0.5, skip_masked=False)
    assert found[0].tolist() == pytest.approx([0, -0.06875, -0.0375, 0, 0.25, 0.5, 0.8, 0], abs=1e-15)


def test_a_row_without_a_hole_beside_one_with_a_hole_keeps_its_distances() -> None:
    """R = 1 at the end, gamma 0.5. A shortcut for masks without holes must ask every row."""
    mask = torch.tensor([[0.0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    found = discounted_returns(token_rewards(torch.ones(3), torch.zeros(3, 4), mask, 0.0), mask, gamma=0.5)
    assert found.tolist() == [[0, 0.25, 0.5, 1], [0.5, 0, 1, 0], [0, 0, 0, 0]]


def test_each_row_gets_its_own_reward_and_an_empty_row_gets_none() -> None:
    mask = torch.tensor([[0.0, 1, 1], [0, 0, 0], [1, 0, 0]])
    found = token_rewards(torch.tensor([1.0, 5.0, -2.0]), torch.zeros(3, 3), mask, kl_coef=0.1)
    assert found.tolist() == [[0, 0, 1], [0, 0, 0], [-2, 0, 0]]
    assert discounted_returns(found, mask, gamma=0.5).tolist() == [[0, 0.5, 1], [0, 0, 0], [-2, 0, 0]]


def test_nan_outside_the_mask_reaches_neither_rewards_nor_returns() -> None:
    kl = torch.where(MASK != 0, KL, torch.nan)
    found = token_rewards(REWARDS, kl, MASK, kl_coef=0.5)
    assert found[0].tolist() == pytest.approx(TOKEN_REWARDS, abs=1e-15)
    returns = discounted_returns(torch.where(MASK != 0, found, torch.nan), MASK, gamma=0.5)
    assert returns[0].tolist() == pytest.approx(RETURNS, abs=1e-15)


def test_a_long_response_is_summed_in_float64() -> None:
    """Float32 accumulation would be off by 1e-4 or so."""
    length = 4000
    kl = torch.full((1, length), 1e-3)
    mask = torch.ones(1, length)
    found = discounted_returns(token_rewards(torch.tensor([1000.0]), kl, mask, kl_coef=0.01), mask, gamma=1.0)
    expected = 1000.0 - math.fsum([0.01 * kl[0, 0].item()] * length)
    assert found[0, 0].item() == pytest.approx(expected, abs=1e-9)


@given(
    tokens=st.lists(st.tuples(st.booleans(), st.floats(-5, 5)), min_size=1, max_size=12),
    gamma=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_returns_equal_the_double_sum_over_response_tokens(tokens: list[tuple[bool, float]], gamma: float) -> None:
    mask = torch.tensor([[float(inside) for inside, _ in tokens]])
    rewards = torch.tensor([[reward for _, reward in tokens]], dtype=torch.float64)
    kept = [reward for inside, reward in tokens if inside]
    expected = [sum(gamma**k * r for k, r in enumerate(kept[t:])) for t in range(len(kept))]
    found = discounted_returns(rewards, mask, gamma)
    assert found[mask != 0].tolist() == pytest.approx(expected, abs=1e-12)
    assert (found[mask == 0] == 0).all()
