"""The reward of reasoning-gym's own verifiers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import reasoning_gym

from megatron_rpp.config.data import SourceConfig
from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.data.reasoning_gym import gym_problems
from megatron_rpp.experience.types import Prompt, Rollout, VersionSpan
from megatron_rpp.reward.build import build_reward
from megatron_rpp.reward.protocol import Reward
from megatron_rpp.reward.reasoning_gym import ReasoningGymReward, bare_answer

SUMS = SourceConfig(kind="reasoning_gym", task="chain_sum", size=4)


def rollout(text: str, entry: dict) -> Rollout:
    prompt = Prompt(id=0, text="", token_ids=(1,), answer=str(entry["answer"]), metadata=entry)
    return Rollout(prompt, 0, (1,), (0.0,), text, "stop", (VersionSpan(0, 0, 1),))


def task_reward(task: str, **settings: Any) -> ReasoningGymReward:
    return ReasoningGymReward(RewardConfig(**settings), {"": SourceConfig(kind="reasoning_gym", task=task)})


@pytest.fixture(scope="module")
def sums() -> Iterator[Reward]:
    reward = build_reward(RewardConfig(kind="reasoning_gym", correct=2.0, wrong=-1.0), {"": SUMS})
    yield reward
    reward.close()


def test_the_task_scores_the_extracted_answer(sums: Reward) -> None:
    for _, entry in gym_problems(SUMS):
        answer = entry["answer"]
        texts = [answer, f"The answer is {answer}.", rf"so \boxed{{{answer}}}", f"I think it is {answer}"]
        assert sums([rollout(text, entry) for text in texts]) == [2.0] * 4
        assert sums([rollout(str(int(answer) + 1), entry), rollout("", entry)]) == [-1.0, -1.0]


def test_a_partial_score_is_scaled_between_wrong_and_correct() -> None:
    # basic_arithmetic gives len(oracle) / len(answer) where the answer contains the oracle's.
    entry = {"question": "", "answer": "47", "metadata": {}}
    reward = task_reward("basic_arithmetic", correct=3.0, wrong=1.0)
    assert reward([rollout("1470", entry)]) == [pytest.approx(1.0 + 2.0 * 0.5)]
    reward.close()


def test_a_verifier_that_evaluates_hostile_text_is_cut_off() -> None:
    entry = reasoning_gym.create_dataset("countdown", size=1, seed=4)[0]
    reward = task_reward("countdown", time_limit_s=0.5)
    texts = [entry["metadata"]["expression"], "9**9**9**9", entry["metadata"]["expression"]]
    assert reward([rollout(text, entry) for text in texts]) == [1.0, 0.0, 1.0]
    reward.close()


def test_an_answer_of_several_lines_reaches_the_verifier_whole() -> None:
    assert bare_answer("1 2\n3 4\n", "1 2\n3 4") == "1 2\n3 4"
    assert bare_answer("I count 12 of them", "12") == "12"
    assert bare_answer("no digits", "12") == ""


def test_an_unknown_task_stops_the_run_with_its_name() -> None:
    reward = task_reward("no_such_task")
    with pytest.raises(RuntimeError, match="no_such_task"):
        reward([rollout("1", {"question": "", "answer": "1", "metadata": {}})])


def test_each_source_is_scored_by_the_verifier_of_its_own_task() -> None:
    sources = {"sums": SUMS, "numbers": SourceConfig(kind="reasoning_gym", task="countdown")}
    reward = ReasoningGymReward(RewardConfig(), sources)
    entry = reasoning_gym.create_dataset("countdown", size=1, seed=4)[0]
    answered = rollout(f"({entry['metadata']['expression']})", entry)  # only countdown evaluates it
    asked = [replace(answered, prompt=replace(answered.prompt, source=name)) for name in sources]
    assert reward(asked)[1] == 1.0 > reward(asked)[0]
    reward.close()
