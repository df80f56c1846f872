"""Settings of the objective that nothing would read, or that contradict one another, are errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_rpp.config import Config
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.presets import GROUP_ESTIMATORS
from megatron_rpp.config.validate import validate

ERRORS: list[tuple[dict[str, Any], str]] = [
    (
        {"algorithm.kl_placement": "none", "algorithm.kl_coef": 0.1},
        "algorithm.kl_coef=0.1 has no effect with algorithm.kl_placement=none",
    ),
    (
        {"algorithm.kl_target": 0.1, "algorithm.kl_coef": 0.0},
        "algorithm.kl_target=0.1 must go with algorithm.kl_coef above 0",
    ),
    ({"algorithm.gamma": 0.9, "algorithm.estimator": "grpo"}, "algorithm.gamma=0.9 must be 1 for .*=grpo"),
    ({"algorithm.gamma": 0.9, "algorithm.kl_placement": "instant"}, "algorithm.gamma=0.9 must be 1 for .*=instant"),
    (
        {"algorithm.loss_constant": 100},
        "algorithm.loss_constant=100 must go with algorithm.loss_aggregation=constant",
    ),
    (
        {"reward.overlong_buffer_tokens": 2000},
        "reward.overlong_buffer_tokens=2000 must be at most rollout.max_response_tokens=1024",
    ),
    (
        {"algorithm.estimator": "remax", "reward.normalization": "running"},
        "algorithm.estimator=remax must go with .*reward.normalization=none",
    ),
    (
        {"algorithm.num_samples_per_prompt": 1, "reward.normalization": "group"},
        "algorithm.num_samples_per_prompt=1 must be at least 2 for reward.normalization=group",
    ),
    ({"algorithm.dual_clip": 0.5}, "algorithm.dual_clip=0.5 must be above 1, or 0 to turn it off"),
    ({"algorithm.variance_ddof": 2}, "algorithm.variance_ddof=2 must be 0 or 1"),
    ({"algorithm.importance_low": 1.5}, "algorithm.importance_low=1.5 must be between 0 and 1"),
    ({"algorithm.importance_high": 0.5}, "algorithm.importance_high=0.5 must be at least 1"),
    ({"algorithm.kl_loss_estimator": "k1"}, "algorithm.kl_loss_estimator=k1 must be one of: k2, k3"),
]


@pytest.mark.parametrize(("changes", "expected"), ERRORS, ids=[" ".join(changes) for changes, _ in ERRORS])
def test_error_names_the_setting_and_what_it_must_be(
    make: Callable[..., Config], changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        validate(make(changes), "train")


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
def test_a_group_baseline_needs_two_samples_a_prompt(make: Callable[..., Config], estimator: str) -> None:
    changes = {"algorithm.estimator": estimator, "algorithm.num_samples_per_prompt": 1}
    with pytest.raises(ConfigError, match=f"num_samples_per_prompt=1 must be at least 2 .*estimator={estimator}"):
        validate(make(changes), "train")


@pytest.mark.parametrize("estimator", ["reinforce_pp", "remax"])
def test_one_sample_a_prompt_is_enough_without_a_group_baseline(make: Callable[..., Config], estimator: str) -> None:
    validate(make({"algorithm.estimator": estimator, "algorithm.num_samples_per_prompt": 1}), "train")
