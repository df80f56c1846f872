"""When a step has enough, what becomes of what it has drawn, and how busy the servers were: numbers by hand."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rpp.config.fields import build
from megatron_rpp.data.prompt_source import Draw
from megatron_rpp.experience.types import Prompt
from megatron_rpp.rollout.sampler import Flight
from megatron_rpp.rollout.schedule.quota import Counts, Quota, quota_of
from megatron_rpp.rollout.schedule.settlement import Report, settle
from megatron_rpp.rollout.schedule.usage import idle_fraction, usage_metrics


def of(**schedule: Any) -> Quota:
    batch = {"rollout.num_prompts": 10, "algorithm.num_samples_per_prompt": 4, "train.batch_size": 10}
    return quota_of(build(batch | {f"schedule.{key}": value for key, value in schedule.items()}))


@pytest.mark.parametrize(
    ("schedule", "at_once", "draws"),
    [
        ({}, 10, 10),
        ({"over_sampling": 1.1}, 11, 11),
        ({"over_sampling": 1.25}, 13, 13),
        ({"dynamic_sampling": True}, 10, 40),
        ({"dynamic_sampling": True, "max_draws": 1.55}, 10, 16),
        ({"dynamic_sampling": True, "max_draws": 1.1}, 10, 11),
        ({"dynamic_sampling": True, "max_draws": 1.25, "over_sampling": 1.25}, 13, 13),
    ],
)
def test_how_many_prompts_a_step_draws(schedule: dict[str, Any], at_once: int, draws: int) -> None:
    quota = of(**schedule)
    assert (quota.groups, quota.at_once, quota.draws, quota.least_groups) == (10, at_once, draws, 3)


def test_budgets_wait_for_a_train_batch() -> None:
    quota = of(time_budget_s=5.0, token_budget=100)
    assert not quota.is_met(Counts(kept=2, tokens=1000), 60.0)
    assert quota.is_met(Counts(kept=3, tokens=99), 5.0)
    assert quota.is_met(Counts(kept=3, tokens=100), 4.9)
    assert not quota.is_met(Counts(kept=9, tokens=99), 4.9)
    assert of().is_met(Counts(kept=4, awaited=6), 0.0), "six are awaited whatever happens"
    assert not of().is_met(Counts(kept=9, tokens=10**9), 10**9), "0 is no limit"


def test_a_group_that_came_to_nothing_makes_room_for_another() -> None:
    quota = of(dynamic_sampling=True, max_draws=1.2)
    assert quota.allows(9, Counts()) and not quota.allows(10, Counts())
    assert quota.allows(10, Counts(lost=1)) and not quota.allows(11, Counts(lost=1))
    assert quota.allows(11, Counts(lost=5)) and not quota.allows(12, Counts(lost=5)), "max_draws"


def test_who_is_awaited_are_the_first_that_were_put_off_too_often() -> None:
    draws = [Draw(i, Prompt(i, "", (i,), ""), deferrals) for i, deferrals in enumerate([2, 0, 3, 1, *[2] * 20])]
    assert of().awaited(draws) == [0, 2, *range(4, 12)]


def test_of_groups_complete_at_one_moment_the_first_in_the_draw_are_kept() -> None:
    reports = [
        Report({4: 1.0, 0: 2.0}, {1: 0.0}, started=frozenset({0, 1, 4, 6})),
        Report({3: 0.5, 2: 9.0}, {}, started=frozenset({2, 3})),
        Report(),
    ]
    settlement = settle(reports, 3)
    assert settlement.kept == [0, 2, 3] and settlement.skipped == {1: 0.0}
    assert settlement.deferred == [6] and settlement.drawn == 7
    assert settlement.surplus == [4], "complete, and none that a step must wait for soon"
    assert settlement.unasked == [5], "taken from the queue when the step was over, and never begun"
    assert settle(reports, 3, awaited={4}).kept == [0, 2, 4], "what is awaited is not put off again"
    assert settle([Report()], 3).drawn == 0


def test_a_group_that_two_replicas_have_is_a_bug_that_is_told() -> None:
    with pytest.raises(AssertionError, match="sampled twice"):
        settle([Report({1: 1.0}), Report({}, {1: 0.0})], 3)


def test_idle_is_what_is_missing_to_the_most_samples_in_flight() -> None:
    flights = [Flight(0, 10, 4), Flight(0, 5, 4), Flight(5, 10, 2)]  # 8 for 5 s, then 6 for 5 s
    assert idle_fraction(flights) == pytest.approx(1 - 7 / 8)
    assert idle_fraction([Flight(0, 1, 1)]) == 0.0 == idle_fraction([])
    metrics = usage_metrics(flights, ends=[10, 5, 10])
    assert metrics["rollout/tail_s"] == 0.0
    assert usage_metrics(flights, ends=[1, 2, 3, 10])["rollout/tail_s"] == 8.0, "half of four were there after 2 s"
    assert usage_metrics([], []) == {}, "all came from the journal"
