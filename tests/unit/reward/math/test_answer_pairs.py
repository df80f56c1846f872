"""The table of answers, right answers and verdicts, decided by mathematics and the rules of docs/rewards.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.experience.types import Prompt, Rollout, VersionSpan
from megatron_rpp.reward.math.math_answer import MathAnswerReward

TABLE = Path(__file__).with_name("answer_pairs.tsv")


def pairs() -> list[tuple[str, str, str]]:
    """(right or wrong, answer, gold)."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines if not line.startswith("# ")]
    return [(row[0], row[1], row[2]) for row in rows]


def rollout(answer: str, gold: str) -> Rollout:
    prompt = Prompt(id=0, text="", token_ids=(1,), answer=gold)
    text = rf"So the answer is $\boxed{{{answer}}}$."
    return Rollout(prompt, 0, (1,), (0.0,), text, "stop", (VersionSpan(0, 0, 1),))


@pytest.fixture(scope="module")
def reward() -> Iterator[MathAnswerReward]:
    reward = MathAnswerReward(RewardConfig(time_limit_s=20.0))
    yield reward
    reward.close()


def misjudged(reward: MathAnswerReward, table: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    scores = reward([rollout(answer, gold) for _, answer, gold in table])
    assert reward.metrics().sums == {"reward/timeouts": 0.0, "reward/broken": 0.0}
    return [row for row, score in zip(table, scores, strict=True) if (row[0] == "right") != (score == 1.0)]


def test_every_pair_of_the_table_has_its_verdict(reward: MathAnswerReward) -> None:
    assert misjudged(reward, pairs()) == []


def test_a_space_between_a_command_and_a_digit_changes_no_verdict(reward: MathAnswerReward) -> None:
    spaced = re.compile(r"(\\[A-Za-z]+) +(?=\d)")
    without = [(v, spaced.sub(r"\1", answer), spaced.sub(r"\1", gold)) for v, answer, gold in pairs()]
    glued = re.compile(r"(\\(?:le|ge|ne|pm|pi|cdot|times|log|ln|frac|sqrt))(?=\d)")
    with_space = [(v, glued.sub(r"\1 ", answer), glued.sub(r"\1 ", gold)) for v, answer, gold in pairs()]
    changed = sorted({*without, *with_space} - set(pairs()))
    assert len(changed) > 80 and misjudged(reward, changed) == []


def test_the_table_is_large_and_has_as_many_traps() -> None:
    verdicts = [verdict for verdict, _, _ in pairs()]
    assert len(set(pairs())) == len(verdicts) >= 800
    assert set(verdicts) == {"right", "wrong"} and verdicts.count("wrong") >= 280
