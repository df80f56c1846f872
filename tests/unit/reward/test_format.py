"""What the form of a response is worth."""

from __future__ import annotations

import pytest

from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.experience.types import Prompt, Rollout, VersionSpan
from megatron_rpp.reward.format import FormatReward


def rollout(text: str, *, opens_thought: bool = False) -> Rollout:
    prompt = Prompt(0, "2+5", (1,), "7", opens_thought=opens_thought)
    return Rollout(prompt, 0, (1,), (0.0,), text, "stop", (VersionSpan(0, 0, 1),))


def rewards(config: RewardConfig, *rollouts: Rollout) -> list[float]:
    reward = FormatReward(config)
    try:
        return reward(rollouts)
    finally:
        reward.close()


@pytest.mark.parametrize(
    ("form", "text", "has"),
    [
        ("boxed", r"so \boxed{7}", True),
        ("boxed", r"\boxed{\frac{1}{2}}", True),
        ("boxed", r"\boxed{}", False),
        ("boxed", r"\boxed{7", False),
        ("boxed", "7", False),
        ("think", "<think>2+5</think> 7", True),
        ("think", "\n<think>\n2+5\n</think>\n\n7\n", True),
        ("think", "<think>2+5</think>", False),
        ("think", "<think></think>7", False),
        ("think", "2+5</think>7", False),
        ("think", "<think>2+5 7", False),
        ("think", "so <think>2+5</think>7", False),
        ("think", "<think>a</think><think>b</think>7", False),
        ("think", "<think><think>a</think>7", False),
        ("think", "<think>a</think>7</think>", False),
    ],
)
def test_a_format_is_told(form: str, text: str, has: bool) -> None:
    config = RewardConfig(format=form, format_reward=0.25)
    assert rewards(config, rollout(text)) == [0.25 if has else 0.0]


@pytest.mark.parametrize(
    ("pattern", "text", "has"),
    [
        (r"^Answer: \d+$", "Answer: 7", True),
        (r"^Answer: \d+$", "The Answer: 7", False),
        (r"\d", "The Answer: 7", True),
        (r"(?s)begin.*end", "begin\nend", True),
    ],
)
def test_a_pattern_is_found_anywhere_but_where_it_is_anchored(pattern: str, text: str, has: bool) -> None:
    config = RewardConfig(format="pattern", format_pattern=pattern, format_reward=0.25)
    assert rewards(config, rollout(text)) == [0.25 if has else 0.0]


def test_a_prompt_may_open_the_thought() -> None:
    config = RewardConfig(format="think", format_reward=1.0)
    responses = rollout("2+5</think>7", opens_thought=True), rollout("2+5</think>7")
    assert rewards(config, *responses) == [1.0, 0.0]


def test_a_negative_amount_is_for_those_that_have_it_not_and_the_share_is_a_metric() -> None:
    reward = FormatReward(RewardConfig(format="boxed", format_reward=-0.5))
    assert reward([rollout("7"), rollout(r"\boxed{7}"), rollout("7"), rollout("7")]) == [-0.5, 0.0, -0.5, -0.5]
    assert reward.metrics().as_dict() == {"reward/format_mean": 0.25}
    assert reward.metrics().as_dict() == {}


def test_no_format_is_free_and_silent() -> None:
    reward = FormatReward(RewardConfig())
    assert reward([rollout("7")]) == [0.0] and reward.metrics().as_dict() == {}


def test_a_regular_expression_that_runs_away_costs_its_limit() -> None:
    config = RewardConfig(format="pattern", format_pattern="^(a+)+$", format_reward=1.0, time_limit_s=0.5, workers=2)
    reward = FormatReward(config)
    assert reward([rollout("aaa"), rollout("a" * 40 + "b"), rollout("aa")]) == [1.0, 0.0, 1.0]
    metrics = reward.metrics()
    assert metrics.sums["reward/timeouts"] == 1.0 and metrics.as_dict()["reward/format_mean"] == 2 / 3
    reward.close()
