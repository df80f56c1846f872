"""Which mismatch leads to what."""

from __future__ import annotations

import math

import pytest

from megatron_rpp.config.schema import AlgorithmConfig, Config, ParityConfig
from megatron_rpp.parity.measure import Mismatch
from megatron_rpp.parity.policy import Level, corrected, level_of

LIMITS = ParityConfig(warn=0.05, correct=0.1, stop=0.5)


def differing(mean: float) -> Mismatch:
    """Tokens whose log-probs differ by so much."""
    return Mismatch(tokens=100.0, d=100 * mean)


def sampled_otherwise(surprise: float, mean: float = 0.0) -> Mismatch:
    """Tokens whose log-probs are right but for `mean`; s is `surprise` +- 1."""
    return Mismatch(10_000.0, 10_000 * mean, 0.0, 10_000 * surprise, 10_000 * (1 + surprise**2))


@pytest.mark.parametrize(
    ("mean", "level"),
    [(0.05, Level.FINE), (0.06, Level.WARN), (0.2, Level.CORRECT), (0.51, Level.STOP), (math.nan, Level.STOP)],
)
def test_the_highest_threshold_that_is_passed_decides(mean: float, level: Level) -> None:
    assert level_of(differing(mean), LIMITS) == level


def test_a_threshold_of_zero_is_never_passed() -> None:
    assert level_of(differing(9.0), ParityConfig(warn=0.0, correct=0.0, stop=0.0)) == Level.FINE
    assert level_of(differing(9.0), ParityConfig(warn=0.05, correct=0.0, stop=0.0)) == Level.WARN
    assert level_of(differing(9.0), ParityConfig(warn=0.0, correct=1.0, stop=0.0)) == Level.CORRECT


def test_tokens_that_are_not_sampled_as_their_log_probs_say_lead_to_a_warning() -> None:
    assert level_of(sampled_otherwise(-0.3), LIMITS) == Level.WARN
    assert level_of(sampled_otherwise(0.3), LIMITS) == Level.WARN
    assert level_of(sampled_otherwise(-0.03), LIMITS) == Level.FINE, "0.03 is chance here"


def test_no_warning_where_the_user_asked_for_a_nucleus_or_for_no_warnings() -> None:
    assert level_of(sampled_otherwise(-0.3), LIMITS, top_p=0.9) == Level.FINE
    assert level_of(sampled_otherwise(-0.3), ParityConfig(warn=0.0)) == Level.FINE


def test_a_bias_that_differences_of_log_probs_may_have_made_is_no_sign_of_its_own() -> None:
    assert level_of(sampled_otherwise(-0.09, mean=0.04), LIMITS) == Level.FINE
    assert level_of(sampled_otherwise(-0.09, mean=0.02), LIMITS) == Level.WARN


def test_a_correction_truncates_and_leaves_the_rest_of_the_configuration() -> None:
    config = Config()
    assert config.algorithm.importance_correction == "off"
    found = corrected(config)
    assert found.algorithm.importance_correction == "truncated"
    assert found.rollout == config.rollout and found.algorithm.kl_coef == config.algorithm.kl_coef


def test_a_correction_that_the_user_chose_is_kept() -> None:
    config = Config(algorithm=AlgorithmConfig(importance_correction="sequence_masked"))
    assert corrected(config) is config
