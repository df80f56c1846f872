"""When the monitor looks for a cause, and what it does about one; the search itself is replaced."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config, ParityConfig
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.parity import monitor
from megatron_rpp.parity.diagnosis import Diagnosis
from megatron_rpp.parity.monitor import LOOK_AGAIN_STEPS, ParityMonitor
from megatron_rpp.parity.policy import ParityError

LIMITS = ParityConfig(warn=0.05, correct=0.1, stop=0.5)


class Leader:
    """The only rank of a job."""

    is_replica_leader = True
    rank = 0


class Policy:
    parallel = Leader()


class Parts:
    """What the monitor itself reads of `RunParts`."""

    def __init__(self, limits: ParityConfig, *, sleeping: bool = False) -> None:
        self.config = Config(parity=limits, rollout=RolloutConfig(release_memory=sleeping))
        self.policy = Policy()


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The mean difference of each search for a cause; one always finds numerics."""
    means: list[float] = []

    def gather(parts: Any, batch: Any, rollouts: Any, mismatch: Any, awake: Any) -> None:
        means.append(mismatch.mean)

    monkeypatch.setattr(monitor, "gather_evidence", gather)
    monkeypatch.setattr(monitor, "diagnose", lambda evidence: Diagnosis("numerics", "planted"))
    monkeypatch.setattr(monitor, "gather_objects", lambda value: [value])
    return means


def make(limits: ParityConfig = LIMITS, *, sleeping: bool = False) -> ParityMonitor:
    return ParityMonitor(Parts(limits, sleeping=sleeping))  # type: ignore[arg-type]


def batch_off_by(difference: float, tokens: int = 2, entropy: float = 1.0) -> ExperienceBatch:
    """One response whose every token has the engine's log-prob -1."""
    mask = torch.tensor([[0.0] + [1.0] * tokens])
    engine = torch.full_like(mask, -1.0)
    return ExperienceBatch(
        tokens=torch.zeros(mask.shape, dtype=torch.int64),
        loss_mask=mask,
        rollout_logprobs=engine,
        rewards=torch.zeros(1),
        group_ids=torch.zeros(1, dtype=torch.int64),
        old_logprobs=engine - difference,
        entropy=torch.full_like(mask, entropy),
    )


def test_a_healthy_step_is_measured_and_costs_no_search(searches: list[float]) -> None:
    watch = make()
    found = watch.check(0, batch_off_by(0.01), [])
    assert searches == [] and found.diagnosis is None
    assert found.metrics["mismatch/logprob_abs_mean"] == pytest.approx(0.01)
    assert found.metrics["mismatch/corrected"] == 0.0
    assert found.config == Config(parity=LIMITS)


def test_a_warning_names_the_cause_and_leaves_the_loss_alone(
    searches: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = make().check(4, batch_off_by(0.06), [])
    assert "step 4" in caplog.text and "numerics: planted" in caplog.text and "parity.warn=0.05" in caplog.text
    assert found.metrics["mismatch/cause_numerics"] == 1.0
    assert found.config.algorithm.importance_correction == "off"


def test_a_correction_is_of_every_step_above_its_threshold_and_not_of_those_below(searches: list[float]) -> None:
    watch = make()
    used = [watch.check(step, batch_off_by(d), []) for step, d in enumerate((0.2, 0.2, 0.06))]
    assert [p.config.algorithm.importance_correction for p in used] == ["truncated", "truncated", "off"]
    assert [p.metrics["mismatch/corrected"] for p in used] == [1.0, 1.0, 0.0]


def test_a_stop_raises_with_the_cause(searches: list[float]) -> None:
    with pytest.raises(ParityError, match=r"step 7.*0\.6 nats.*parity\.stop=0\.5.*numerics: planted"):
        make().check(7, batch_off_by(0.6), [])


def test_a_standing_difference_is_not_searched_at_every_step_but_now_and_then(searches: list[float]) -> None:
    watch = make()
    for step in range(LOOK_AGAIN_STEPS + 1):
        watch.check(step, batch_off_by(0.06), [])
    assert len(searches) == 2


def test_a_difference_that_rises_is_searched_at_once(searches: list[float]) -> None:
    watch = make()
    for step, difference in enumerate((0.06, 0.2, 0.06, 0.01, 0.06)):
        watch.check(step, batch_off_by(difference), [])
    assert searches == pytest.approx([0.06, 0.2])


def test_a_difference_that_doubles_within_a_level_is_searched_at_once(searches: list[float]) -> None:
    watch = make(ParityConfig(warn=0.05, correct=0.0, stop=2.0))
    for step, difference in enumerate((0.06, 0.11, 0.3, 0.5, 0.06, 0.7)):
        watch.check(step, batch_off_by(difference), [])
    assert searches == pytest.approx([0.06, 0.3, 0.7])


def test_a_log_prob_that_is_not_a_number_is_searched_once(searches: list[float]) -> None:
    watch = make(ParityConfig(warn=0.05, correct=0.0, stop=0.0))
    for step, difference in enumerate((0.06, float("nan"), float("nan"), 0.3)):
        watch.check(step, batch_off_by(difference), [])
    assert len(searches) == 2


def test_right_log_probs_of_tokens_sampled_otherwise_are_no_rise(searches: list[float]) -> None:
    watch = make()
    for step, difference in enumerate((2.0**-20, 2.0**-17)):
        watch.check(step, batch_off_by(difference, tokens=64, entropy=1.4), [])
    assert len(searches) == 1


def test_a_resumed_run_searches_when_the_first_would_have(searches: list[float]) -> None:
    limits = ParityConfig(warn=0.05, stop=2.0)
    first, resumed = make(limits), make(limits)
    first.check(0, batch_off_by(0.06), [])
    resumed.load_state_dict(first.state_dict())
    for step, difference in ((1, 0.11), (2, 0.13)):
        resumed.check(step, batch_off_by(difference), [])
    assert searches == pytest.approx([0.06, 0.13])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The rollouts of each time that servers were asked before they slept."""
    found: list[list[str]] = []
    monkeypatch.setattr(monitor, "ask_while_awake", lambda parts, rollouts: found.append(rollouts) or "answer")
    return found


def test_servers_that_slept_in_a_search_are_asked_once_before_they_sleep_again(
    searches: list[float], asked: list[list[str]]
) -> None:
    watch = make(sleeping=True)
    for step in range(4):
        watch.ask_while_awake([f"of step {step}"])  # type: ignore[list-item]
        watch.check(step, batch_off_by(0.06), [])
    assert asked == [["of step 1"]]
    assert searches == pytest.approx([0.06, 0.06]), "the second with what they said"


def test_what_servers_said_is_not_kept_for_a_later_difference(searches: list[float], asked: list[list[str]]) -> None:
    watch = make(sleeping=True)
    for step, difference in enumerate((0.06, 0.01, 0.06)):
        watch.ask_while_awake([])
        watch.check(step, batch_off_by(difference), [])
    assert len(asked) == 1 and len(searches) == 1


def test_a_resumed_run_still_asks_the_servers(searches: list[float], asked: list[list[str]]) -> None:
    first, resumed = make(sleeping=True), make(sleeping=True)
    first.check(0, batch_off_by(0.06), [])
    resumed.load_state_dict(first.state_dict())
    resumed.ask_while_awake([])
    assert len(asked) == 1


def test_servers_that_are_awake_in_a_search_are_not_asked_again(searches: list[float], asked: list[list[str]]) -> None:
    watch = make()
    for step in range(2):
        watch.ask_while_awake([])
        watch.check(step, batch_off_by(0.06), [])
    assert asked == []


def test_a_difference_round_the_threshold_is_not_searched_at_every_other_step(searches: list[float]) -> None:
    watch = make()
    for step in range(LOOK_AGAIN_STEPS + 1):
        watch.check(step, batch_off_by(0.049 if step % 2 else 0.051), [])
    assert len(searches) == 2, "the first and the one after LOOK_AGAIN_STEPS"


def test_a_rise_is_searched_anew_after_the_search_of_a_lower_level(searches: list[float]) -> None:
    watch = make()
    for step, difference in ((0, 0.2), (LOOK_AGAIN_STEPS, 0.06), (LOOK_AGAIN_STEPS + 1, 0.21)):
        watch.check(step, batch_off_by(difference), [])
    assert searches == pytest.approx([0.2, 0.06, 0.21])


def test_a_warning_of_right_log_probs_says_that_the_surprisal_passed_the_threshold(
    searches: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        make().check(4, batch_off_by(2.0**-20, tokens=64, entropy=1.4), [])
    assert "mean surprisal of -0.4 nats above the entropy" in caplog.text and "beyond parity.warn=0.05" in caplog.text
    assert "differ by 9.54e-07 only" in caplog.text


def test_a_log_prob_that_is_not_a_number_stops_the_run(searches: list[float]) -> None:
    with pytest.raises(ParityError, match="nan"):
        make().check(0, batch_off_by(float("nan")), [])
