"""Advantages on numbers worked by hand: every estimator with every placement of the KL."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rpp.algorithm.advantages import compute_advantages
from megatron_rpp.algorithm.masked import Moments, global_moments
from megatron_rpp.config.schema import AlgorithmConfig
from tests.unit.algorithm.cases import one_rank

ESTIMATORS = ("reinforce_pp", "reinforce_pp_baseline", "grpo", "dr_grpo", "rloo", "remax")


def advantages(rewards: list[float], kl: list[list[float]], mask: list[list[int]], **settings: Any) -> Tensor:
    """With the settings of `paper` unless given; all rows are one group unless group_ids says otherwise."""
    group_ids = torch.tensor(settings.pop("group_ids", [0] * len(rewards)))
    return compute_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(kl, dtype=torch.float64),
        torch.tensor(mask),
        group_ids,
        **settings,
    )


def one_token_each(rewards: list[float], **settings: Any) -> list[float]:
    """Advantages of responses of one token, without KL."""
    ones = [[1]] * len(rewards)
    return advantages(rewards, [[0.0]] * len(rewards), ones, kl_coef=0.0, **settings).flatten().tolist()


def moments_of(found: Tensor, mask: Tensor) -> Moments:
    return global_moments(found, mask, one_rank)


# Two prompts, of 2 and 3 responses: rewards 4, 0 (mean 2, Bessel variance 8) and 1, 2, 6 (mean 3, Bessel variance 7).
BY_ESTIMATOR = {
    # mean 2.6, squares 23.2 / 5 = 4.64
    "reinforce_pp": [x / sqrt(4.64) for x in (1.4, -2.6, -1.6, -0.6, 3.4)],
    # minus the group mean: squares 22 / 5 = 4.4
    "reinforce_pp_baseline": [x / sqrt(4.4) for x in (2, -2, -2, -1, 3)],
    "grpo": [
        2 / (sqrt(8) + 1e-6),
        -2 / (sqrt(8) + 1e-6),
        -2 / (sqrt(7) + 1e-6),
        -1 / (sqrt(7) + 1e-6),
        3 / (sqrt(7) + 1e-6),
    ],
    "dr_grpo": [2, -2, -2, -1, 3],
    "rloo": [4 - 0, 0 - 4, 1 - 4, 2 - 3.5, 6 - 1.5],
    "remax": [4 - 1, 0 - 1, 1 - 2, 2 - 2, 6 - 2],  # greedy rewards 1 and 2
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_each_estimator_subtracts_its_own_baseline(estimator: str) -> None:
    found = one_token_each(
        [4, 1, 0, 2, 6],
        group_ids=[7, 2, 7, 2, 2],
        estimator=estimator,
        greedy_rewards=torch.tensor([1.0, 2, 1, 2, 2]),
    )
    by_group = [found[0], found[2], found[1], found[3], found[4]]
    assert by_group == pytest.approx(BY_ESTIMATOR[estimator], rel=1e-12, abs=1e-12)


# One prompt, two responses of 2 and 1 tokens: R = 3, 1; beta kl = 0.5, 1.5 and 1; greedy reward 2 and 0.
# KL to go: 2, 1.5 and 1; folded into the scores: R = 1, 0. Before any normalization:
GRPO, GRPO_FOLDED = 1 / (sqrt(2) + 1e-6), 0.5 / (sqrt(0.5) + 1e-6)
BY_PLACEMENT = {
    ("reinforce_pp", "to_go"): [1.0, 1.5, 0.0],
    ("reinforce_pp", "folded"): [1.0, 1.0, 0.0],
    ("reinforce_pp", "instant"): [2.5, 1.5, 0.0],
    ("reinforce_pp", "none"): [3.0, 3.0, 1.0],
    ("reinforce_pp_baseline", "to_go"): [-1.0, -0.5, -2.0],
    ("reinforce_pp_baseline", "folded"): [0.5, 0.5, -0.5],
    ("reinforce_pp_baseline", "instant"): [0.5, -0.5, -2.0],
    ("reinforce_pp_baseline", "none"): [1.0, 1.0, -1.0],
    ("grpo", "to_go"): [GRPO - 2, GRPO - 1.5, -GRPO - 1],
    ("grpo", "folded"): [GRPO_FOLDED, GRPO_FOLDED, -GRPO_FOLDED],
    ("grpo", "instant"): [GRPO - 0.5, GRPO - 1.5, -GRPO - 1],
    ("grpo", "none"): [GRPO, GRPO, -GRPO],
    ("dr_grpo", "to_go"): [-1.0, -0.5, -2.0],
    ("dr_grpo", "folded"): [0.5, 0.5, -0.5],
    ("dr_grpo", "instant"): [0.5, -0.5, -2.0],
    ("dr_grpo", "none"): [1.0, 1.0, -1.0],
    ("rloo", "to_go"): [0.0, 0.5, -3.0],
    ("rloo", "folded"): [1.0, 1.0, -1.0],
    ("rloo", "instant"): [1.5, 0.5, -3.0],
    ("rloo", "none"): [2.0, 2.0, -2.0],
    ("remax", "to_go"): [-1.0, -0.5, 0.0],
    ("remax", "folded"): [-1.0, -1.0, 0.0],
    ("remax", "instant"): [0.5, -0.5, 0.0],
    ("remax", "none"): [1.0, 1.0, 1.0],
}
# The REINFORCE++ values above less their mean, by their population deviation: the same ratios for both estimators.
NORMALIZED = {
    "to_go": [1 / sqrt(14), 4 / sqrt(14), -5 / sqrt(14)],  # deviations 1/6, 4/6, -5/6; variance 14/36
    "folded": [1 / sqrt(2), 1 / sqrt(2), -2 / sqrt(2)],  # 1/3, 1/3, -2/3; 2/9
    "instant": [7 / sqrt(38), 1 / sqrt(38), -8 / sqrt(38)],  # 7/6, 1/6, -8/6; 38/36
    "none": [1 / sqrt(2), 1 / sqrt(2), -2 / sqrt(2)],  # 2/3, 2/3, -4/3; 8/9
}


@pytest.mark.parametrize(("estimator", "placement"), BY_PLACEMENT)
def test_each_kl_placement_with_each_estimator(estimator: str, placement: str) -> None:
    """A KL that entered twice, at the wrong side of the baseline or at the wrong token would show in one of 24."""
    found = advantages(
        [3.0, 1.0],
        [[1.0, 3.0], [2.0, 99.0]],
        [[1, 1], [1, 0]],
        estimator=estimator,
        kl_placement=placement,
        kl_coef=0.5,
        greedy_rewards=torch.tensor([2.0, 0.0]),
    )
    before = BY_PLACEMENT[estimator, placement]
    expected = NORMALIZED[placement] if estimator.startswith("reinforce_pp") else before
    assert found.flatten().tolist() == pytest.approx([*expected, 0.0], rel=1e-12, abs=1e-12)


def test_reward_clip_acts_after_the_baseline() -> None:
    """Rewards 30, 0, mean 15: +-15 are cut to +-10. Cut before the baseline, 10 and 0 would give +-5."""
    assert one_token_each([30, 0], estimator="dr_grpo", reward_clip=10.0) == [10.0, -10.0]
    assert one_token_each([30, 0], estimator="dr_grpo", reward_clip=0.0) == [15.0, -15.0]
    assert one_token_each([30, 3, 5], estimator="remax", reward_clip=4.0, greedy_rewards=torch.zeros(3)) == [4, 3, 4]


def test_reward_clip_acts_before_the_normalization_and_leaves_the_kl_alone() -> None:
    """R = 30, 0, 1 cut to 20, 0, 1, then beta kl = 12 on the second: 20, -12, 1; mean 3, variance 518/3.

    Cut after the normalization, nothing would be.
    """
    found = advantages([30.0, 0.0, 1.0], [[0.0], [12.0], [0.0]], [[1]] * 3, kl_coef=1.0, reward_clip=20.0)
    expected = [x / sqrt(518 / 3) for x in (17, -15, -2)]
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("skips", "expected"),
    [
        (True, [-4 / sqrt(14), 0, -1 / sqrt(14), 5 / sqrt(14)]),  # G = 1/4, 1/2, 1
        (False, [-10 / sqrt(74), 0, -1 / sqrt(74), 11 / sqrt(74)]),  # G = 1/8, 1/2, 1
    ],
)
def test_gamma_counts_an_observation_token_only_where_it_is_told_to(skips: bool, expected: list[float]) -> None:
    """R = 1, gamma 1/2, an observation at position 1: its distance counts or not, the return is never reset."""
    found = advantages([1.0], [[0.0] * 4], [[1, 0, 1, 1]], kl_coef=0.0, gamma=0.5, gamma_skips_masked=skips)
    assert found[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_gamma_is_for_reinforce_pp_alone() -> None:
    """The other estimators give a response's score to each of its tokens."""
    for estimator in ESTIMATORS[1:]:
        settings: dict[str, Any] = {"estimator": estimator, "greedy_rewards": torch.zeros(2), "kl_coef": 0.3}
        batch = ([1.0, 0.0], [[1.0, 2.0], [3.0, 4.0]], [[1, 1], [1, 1]])
        assert torch.equal(advantages(*batch, gamma=0.5, **settings), advantages(*batch, gamma=1.0, **settings))


def test_variance_settings_reach_the_normalization() -> None:
    """Rewards +-2e-4; see test_masked for the four numbers."""
    for ddof, floor, value in ((0, "clamp", 1.0), (0, "add", 2 / sqrt(5)), (1, "clamp", sqrt(0.5)), (1, "add", 2 / 3)):
        found = one_token_each([2e-4, -2e-4], variance_ddof=ddof, variance_floor=floor)
        assert found == pytest.approx([value, -value], rel=1e-12)


@pytest.mark.parametrize(
    ("estimator", "lone", "others"),
    [
        ("dr_grpo", 5.0, [1.0, -1.0]),
        ("rloo", 5.0, [2.0, -2.0]),
        ("grpo", 5.0, [1 / (sqrt(2) + 1e-6), -1 / (sqrt(2) + 1e-6)]),
    ],
)
def test_a_response_alone_in_its_group_scores_zero_or_its_reward(
    estimator: str, lone: float, others: list[float]
) -> None:
    """Neither a division by n - 1 = 0 nor, for `grpo`, by its own deviation of 0 plus 1e-6."""
    settings: dict[str, Any] = {"group_ids": [3, 1, 1], "estimator": estimator}
    assert one_token_each([5, 3, 1], lone_sample="zero", **settings) == pytest.approx([0.0, *others], rel=1e-12)
    assert one_token_each([5, 3, 1], lone_sample="raw", **settings) == pytest.approx([lone, *others], rel=1e-12)


def test_a_lone_sample_enters_the_global_normalization_with_its_score() -> None:
    """Scores 0, 1, -1: variance 2/3. Raw, with beta kl = 2 folded in: 3, 1, -1: mean 1, variance 8/3."""
    batch = ([5.0, 3.0, 1.0], [[2.0], [0.0], [0.0]], [[1]] * 3)
    settings: dict[str, Any] = {"group_ids": [3, 1, 1], "estimator": "reinforce_pp_baseline", "kl_placement": "folded"}
    zero = advantages(*batch, kl_coef=1.0, lone_sample="zero", **settings).flatten().tolist()
    raw = advantages(*batch, kl_coef=1.0, lone_sample="raw", **settings).flatten().tolist()
    assert zero == pytest.approx([0.0, sqrt(1.5), -sqrt(1.5)], rel=1e-12)
    assert raw == pytest.approx([2 / sqrt(8 / 3), 0.0, -2 / sqrt(8 / 3)], rel=1e-12, abs=1e-15)


def test_normalization_is_over_tokens_with_population_variance() -> None:
    """Rewards 1 and 0 on responses of 1 and 3 tokens: mean 1/4, variance 3/16, A = 3/sqrt(3) and -1/sqrt(3).

    Over responses the mean would be 1/2; with ddof 1 the first advantage would be 1.5.
    """
    mask = [[0, 1, 0, 0], [0, 1, 1, 1]]
    found = advantages([1.0, 0.0], [[0.0] * 4] * 2, mask, kl_coef=0.0)
    high, low = sqrt(3), -1 / sqrt(3)
    assert found.flatten().tolist() == pytest.approx([0, high, 0, 0, 0, low, low, low], abs=1e-12)
    after = moments_of(found, torch.tensor(mask))
    assert after.mean.item() == pytest.approx(0.0, abs=1e-12)
    assert after.variance.item() == pytest.approx(1.0, abs=1e-12)


def test_kl_and_gamma_enter_before_the_normalization() -> None:
    """r = -0.2, 1 - 0.4 = 0.6; gamma 0.5: G = 0.1, 0.6; mean 0.35, sd 0.25: A = -1, 1."""
    found = advantages([1.0], [[2.0, 4.0]], [[1, 1]], kl_coef=0.1, gamma=0.5)
    assert found[0].tolist() == pytest.approx([-1.0, 1.0], rel=1e-12)
    without_kl = advantages([1.0], [[2.0, 4.0]], [[1, 1]], kl_coef=0.0)
    assert without_kl[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("reward", [0.7, -0.37, 1.7])
def test_equal_rewards_give_zero_advantages_and_zero_std(reward: float) -> None:
    """Float32 one-pass whitening gives NaN here (seen in a peer)."""
    mask = (torch.arange(11) < torch.tensor([[3], [11], [0], [7]])).float()
    group_ids = torch.zeros(4, dtype=torch.int64)
    found = compute_advantages(torch.full((4,), reward), torch.zeros(4, 11), mask, group_ids, kl_coef=0.01)
    assert found.abs().max().item() < 1e-8
    after = moments_of(found, mask)
    assert after.mean.abs().item() < 1e-8 and after.variance.item() < 1e-16


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_batch_without_any_response_token_gives_zeros(estimator: str) -> None:
    nans = [[torch.nan] * 3] * 2
    found = advantages([1.0, 1.0], nans, [[0] * 3] * 2, estimator=estimator, greedy_rewards=torch.ones(2))
    assert found.tolist() == [[0.0] * 3] * 2


def test_std_of_the_advantages_shows_a_batch_below_the_variance_floor() -> None:
    """Returns +-1e-6 are divided by 1e-4: the standard deviation is 0.01, not its square and not 1."""
    found = torch.tensor([one_token_each([1e-6, -1e-6])], dtype=torch.float64)
    assert moments_of(found, torch.ones(1, 2)).variance.sqrt().item() == pytest.approx(1e-2, rel=1e-12)


def test_worked_example_of_the_documentation() -> None:
    """docs/algorithm.md: returns 0.8, 0.8, -0.1; mean 0.5, variance 0.18."""
    found = advantages([1.0, 0.0], [[0.0, 2.0], [1.0, 0.0]], [[1, 1], [1, 0]], kl_coef=0.1)
    expected = [0.3 / sqrt(0.18), 0.3 / sqrt(0.18), -0.6 / sqrt(0.18), 0]
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_what_a_remax_batch_lacks_is_named() -> None:
    with pytest.raises(ValueError, match=r"estimator=remax needs greedy_rewards"):
        one_token_each([1.0], estimator="remax")


def test_a_misspelt_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown setting kl_coeff; did you mean kl_coef\?"):
        one_token_each([1.0], kl_coeff=0.1)


def test_an_override_wins_over_the_preset_and_a_whole_configuration_is_taken_as_it_is() -> None:
    whole = AlgorithmConfig(estimator="dr_grpo")
    assert one_token_each([3, 1], preset=whole) == [1.0, -1.0]
    assert one_token_each([3, 1], preset=whole, estimator="rloo") == [2.0, -2.0]
    assert one_token_each([3, 1], preset="paper", estimator="rloo") == [2.0, -2.0]
