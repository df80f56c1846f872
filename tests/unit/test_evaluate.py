"""Evaluation: which sets are asked how often, and the names of their numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rpp import evaluate as module
from megatron_rpp.config.data import SourceConfig
from megatron_rpp.config.fields import build
from megatron_rpp.evaluate import evaluate
from megatron_rpp.experience.types import Prompt, Rollout, VersionSpan
from megatron_rpp.reward.protocol import RewardError
from megatron_rpp.rollout.protocol import SamplingParams

# What each prompt's samples say, and the greedy response; 2 is right.
SAID = {
    "easy": ["2", "3", "3", "2"],
    "hard": ["5", "5", "2", "5"],
    "essays": ["a", "b", "c", "d"],
    "code": ["x", "2", "2", "y"],
}
GREEDY = {"easy": "2", "hard": "5", "essays": "a", "code": "2"}


class Engine:
    policy_version = 7

    def __init__(self) -> None:
        self.asked: list[SamplingParams] = []

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        self.asked.append(sampling)
        return [
            Rollout(prompt, group_id, (1,), (0.0,), text, "stop", (VersionSpan(7, 0, 1),))
            for group_id, prompt in enumerate(prompts)
            for text in ([GREEDY[prompt.source]] if sampling.temperature == 0 else SAID[prompt.source])
        ]


def session(prompts: list[Prompt], **settings: Any) -> Any:
    config = build({
        "data.evals.easy.path": "e.jsonl", "data.evals.hard.path": "h.jsonl", "data.evals.code.path": "c.jsonl",
        "data.evals.code.reward": "function", "data.evals.code.verdicts": True,
        "data.evals.essays.path": "w.jsonl", "data.evals.essays.reward": "model", "run.seed": 5, **settings,
    })  # fmt: skip
    sampling = SamplingParams(16, 8, 1.0, 1.0, (0,), seed=1)
    return SimpleNamespace(
        config=config,
        eval_prompts=prompts,
        sampling=lambda step: sampling,
        greedy=lambda: SamplingParams(1, 8, 0.0, 1.0, (0,), seed=1),
        phase=lambda name: nullcontext(),
        rollout_engine=Engine(),
        eval_reward=lambda rollouts: [0.25 if r.prompt.source == "essays" else float(r.text == "2") for r in rollouts],
        parallel=SimpleNamespace(is_replica_leader=True),
    )


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def leader(parallel: Any, call: Callable[[], Any]) -> Any:
        return call()

    monkeypatch.setattr(module, "from_replica_leader", leader)
    monkeypatch.setattr(module, "gather_objects", lambda metrics: [metrics])


PROMPTS = [Prompt(i, "1+1", (1,), "2", source=name) for i, name in enumerate(SAID)]


def test_each_set_has_its_own_numbers_and_grades_are_no_accuracy() -> None:
    s = session(PROMPTS, **{"eval.samples": 4, "eval.pass_at": (2, 4)})
    assert evaluate(s) == pytest.approx({
        "eval/easy/accuracy": 0.5, "eval/easy/pass@2": 5 / 6, "eval/easy/maj@2": 0.5,
        "eval/easy/pass@4": 1.0, "eval/easy/maj@4": 1.0,
        "eval/code/accuracy": 0.5, "eval/code/greedy_accuracy": 1.0,
        "eval/code/pass@2": 5 / 6, "eval/code/pass@4": 1.0,
        "eval/hard/accuracy": 0.25, "eval/hard/pass@2": 0.5, "eval/hard/maj@2": 0.5,
        "eval/hard/pass@4": 1.0, "eval/hard/maj@4": 0.0,
        "eval/essays/reward": 0.25, "eval/essays/greedy_reward": 0.25,
        "eval/easy/greedy_accuracy": 1.0, "eval/hard/greedy_accuracy": 0.0, "eval/policy_version": 7.0,
    })  # fmt: skip
    sampled, greedy = s.rollout_engine.asked
    assert (sampled.num_samples_per_prompt, sampled.seed) == (4, 5) and greedy.temperature == 0


def test_with_one_sample_there_are_only_accuracies() -> None:
    s = session(PROMPTS[:1], **{"data.evals": {"easy": SourceConfig(path="e.jsonl")}})
    one = Rollout(PROMPTS[0], 0, (1,), (0.0,), "2", "stop", (VersionSpan(7, 0, 1),))
    s.rollout_engine.generate = lambda prompts, sampling: [one]
    assert evaluate(s) == {"eval/easy/accuracy": 1.0, "eval/easy/greedy_accuracy": 1.0, "eval/policy_version": 7.0}


@pytest.mark.parametrize("score", [-1.0, 1.5, float("nan")])
def test_a_reward_that_is_no_verdict_though_the_configuration_says_so_is_an_error(score: float) -> None:
    s = session(PROMPTS, **{"eval.samples": 4})
    s.eval_reward = lambda rollouts: [score if r.prompt.source == "code" else 5.0 for r in rollouts]
    with pytest.raises(RewardError, match=r"response of data\.evals\.code was given the reward .* and .*verdicts=true"):
        evaluate(s)


def test_part_of_a_verdict_counts_for_accuracy_alone() -> None:
    s = session(PROMPTS, **{"eval.samples": 4})
    s.eval_reward = lambda rollouts: [0.75] * len(rollouts)
    found = evaluate(s)
    assert found["eval/code/accuracy"] == 0.75 and found["eval/code/pass@4"] == 0.0


def test_without_k_there_is_the_k_of_all_samples() -> None:
    found = evaluate(session(PROMPTS, **{"eval.samples": 4}))
    assert {key for key in found if "@" in key} == {
        "eval/easy/pass@4", "eval/easy/maj@4", "eval/hard/pass@4", "eval/hard/maj@4", "eval/code/pass@4",
    }  # fmt: skip


def test_without_held_out_prompts_nothing_is_sampled() -> None:
    s = session([])
    assert evaluate(s) == {} and s.rollout_engine.asked == []
