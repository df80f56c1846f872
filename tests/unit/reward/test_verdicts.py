"""The numbers of a held-out set, and which answers count as the same vote."""

from __future__ import annotations

from fractions import Fraction

import pytest

from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.experience.types import Prompt, Rollout, VersionSpan
from megatron_rpp.reward.math.vote import vote
from megatron_rpp.reward.verdicts import accuracy, sampled_accuracy, verdict_only


def rollout(text: str, group_id: int = 0, finish_reason: str = "stop") -> Rollout:
    prompt = Prompt(group_id, "1/4+1/4", (1,), "1/2")
    return Rollout(prompt, group_id, (1,), (0.0,), text, finish_reason, (VersionSpan(0, 0, 1),))


@pytest.mark.parametrize(
    "same",
    [
        (r"so \boxed{\frac{1}{2}}", r"\boxed{\dfrac12}", "The answer is 1/2.", "0.5", "x = 0.50", r"$\frac{2}{4}$"),
        (r"\boxed{1{,}000}", "1,000", "#### 1000"),
        (r"\boxed{x + 1}", r"\boxed{x+1}"),
    ],
)
def test_answers_that_differ_only_in_spelling_are_one_vote(same: tuple[str, ...]) -> None:
    assert len({vote(rollout(text)) for text in same}) == 1


def test_other_answers_are_other_votes_and_no_answer_is_none() -> None:
    assert vote(rollout(r"\boxed{0.5}")) == Fraction(1, 2) != vote(rollout(r"\boxed{0.25}"))
    assert vote(rollout(r"\boxed{x+1}")) != vote(rollout(r"\boxed{1+x}")), "no mathematics is done"
    assert vote(rollout("")) is None and vote(rollout(r"\boxed{" + "9" * 1001 + "}")) is None


def test_a_truncated_response_votes_only_by_an_answer_that_it_marks() -> None:
    assert vote(rollout("first 12, then 13", finish_reason="length")) is None
    assert vote(rollout(r"\boxed{12} because 13", finish_reason="length")) == 12


def test_pass_and_majority_are_means_over_prompts() -> None:
    texts = {0: ["1/2", "0.5", "3", "3"], 1: ["7", "7", "7", "1/2"]}
    rollouts = [rollout(text, group) for group, own in texts.items() for text in own]
    scores = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    found = sampled_accuracy("eval/aime/", rollouts, scores, (1, 2, 4)).as_dict()
    assert found == pytest.approx({
        "eval/aime/pass@1": (0.5 + 0.25) / 2, "eval/aime/maj@1": (0.5 + 0.25) / 2,
        "eval/aime/pass@2": (5 / 6 + 0.5) / 2, "eval/aime/maj@2": (0.5 + 0.0) / 2,
        "eval/aime/pass@4": 1.0, "eval/aime/maj@4": 0.5,
    })  # fmt: skip


def test_part_of_a_score_is_no_pass() -> None:
    found = sampled_accuracy("eval/", [rollout("1"), rollout("2")], [0.9, 0.5], (2,)).as_dict()
    assert found == {"eval/pass@2": 0.0, "eval/maj@2": 0.0}


def test_grades_are_rewards_and_not_accuracies() -> None:
    assert accuracy("eval/", [1.0, 0.0], is_verified=True).as_dict() == {"eval/accuracy": 0.5}
    assert accuracy("eval/x/greedy_", [2.5, -0.5], is_verified=False).as_dict() == {"eval/x/greedy_reward": 1.0}


def test_a_verdict_has_nothing_of_form_length_or_scale() -> None:
    shaped = RewardConfig(
        correct=5.0, wrong=-1.0, format="think", format_reward=1.0, overlong_buffer_tokens=9, normalization="group"
    )
    assert verdict_only(shaped) == RewardConfig()
