"""The table of answers, right answers and verdicts, decided by mathematics and the rules of docs/rewards.md."""

from __future__ import annotations

from pathlib import Path

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


def test_every_pair_of_the_table_has_its_verdict() -> None:
    table = pairs()
    reward = MathAnswerReward(RewardConfig(time_limit_s=20.0))
    scores = reward([rollout(answer, gold) for _, answer, gold in table])
    failures = reward.metrics().sums
    reward.close()
    wrong = [row for row, score in zip(table, scores, strict=True) if (row[0] == "right") != (score == 1.0)]
    assert wrong == []
    assert failures == {"reward/timeouts": 0.0, "reward/broken": 0.0}


def test_the_table_is_large_and_has_as_many_traps() -> None:
    verdicts = [verdict for verdict, _, _ in pairs()]
    assert len(set(pairs())) == len(verdicts) >= 500
    assert set(verdicts) == {"right", "wrong"} and verdicts.count("wrong") >= 200
