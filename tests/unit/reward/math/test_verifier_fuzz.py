"""Adversarial answers of the benchmark's own generator: none is paid for, none raises, none stalls a call."""

from __future__ import annotations

from benchmarks.verifier_fuzz import KINDS, adversarial, run
from megatron_rpp.config.reward import RewardConfig


def test_five_thousand_adversarial_answers_are_all_wrong_and_stall_no_call() -> None:
    """In processor time and in answers given up, which do not depend on what else the machine does."""
    config = RewardConfig(time_limit_s=0.3, batch_time_limit_s=600.0, workers=2)
    result = run(5000, seed=1, batch=2500, config=config)
    assert result["crashes"] == 0 and result["false_right"] == 0
    assert result["timeouts"] < 50, "8 at their own limit; a call that stalls gives up all that are behind"
    assert result["processor_s"] < 15.0 and 1.0 < result["workers_processor_s"] < 60.0  # 3.5 and 13 as measured


def test_the_same_seed_gives_the_same_answers_of_every_kind() -> None:
    first = [r.text for r in adversarial(300, seed=3)]
    assert first == [r.text for r in adversarial(300, seed=3)] != [r.text for r in adversarial(300, seed=4)]
    assert max(map(len, first)) > 10_000 and len(KINDS) == 10
