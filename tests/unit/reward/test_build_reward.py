"""Which reward a prompt's source gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rpp.config.data import SourceConfig
from megatron_rpp.config.ranges import CHOICES
from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.experience.types import Prompt, Rollout, VersionSpan
from megatron_rpp.reward.build import _MAKERS, build_reward
from megatron_rpp.reward.math.math_answer import MathAnswerReward


def rollout(text: str, source: str = "", answer: str = "4") -> Rollout:
    prompt = Prompt(id=0, text="", token_ids=(1,), answer=answer, source=source)
    return Rollout(prompt, 0, (1,), (0.0,), text, "stop", (VersionSpan(0, 0, 1),))


def test_values_and_format_are_added_up() -> None:
    config = RewardConfig(correct=3.0, wrong=-2.0, format="boxed", format_reward=0.5)
    built = build_reward(config, {"": SourceConfig()})
    assert built([rollout("4"), rollout("5"), rollout(r"\boxed{4}"), rollout(r"\boxed{5}")]) == [3.0, -2.0, 3.5, -1.5]
    metrics = built.metrics()
    assert metrics.as_dict() == {"reward/format_mean": 0.5, "reward/timeouts": 0.0, "reward/broken": 0.0}


def test_each_source_has_its_kind_and_order_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def f(rollouts):\n    return [100.0 + len(r.text) for r in rollouts]\n")
    sources = {"math": SourceConfig(), "essays": SourceConfig(reward="function"), "more": SourceConfig()}
    built = build_reward(RewardConfig(function=f"{file}:f"), sources)
    rollouts = [rollout("4", "math"), rollout("abc", "essays"), rollout("5", "more"), rollout("", "essays")]
    assert built(rollouts) == [1.0, 103.0, 0.0, 100.0]
    assert built([replace(rollouts[1])]) == [103.0]
    assert built([]) == []
    assert [type(r) for r in built._rewards.values()].count(MathAnswerReward) == 1  # two sources, one pool


def test_every_kind_that_may_be_set_has_a_maker() -> None:
    assert sorted(_MAKERS) == sorted(CHOICES["reward.kind"])


def test_a_function_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"no_such\.py cannot be imported"):
        build_reward(RewardConfig(kind="function", function="no_such.py:f"), {"": SourceConfig()}).start()
