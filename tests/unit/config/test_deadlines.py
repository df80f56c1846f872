"""How long a rank may wait, and a phase may last: never less than the limits of what happens in it."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rpp.config.deadlines import longest_wait_s, phase_deadline_s, watchdog_of
from megatron_rpp.config.fields import build
from megatron_rpp.config.reward import START_LIMIT_S

LIMITS = {
    "rollout.request_deadline_s": 10.0,
    "rollout.startup_deadline_s": 20.0,
    "rollout.max_retries": 1,
    "weight_sync.deadline_s": 5.0,
    "reward.batch_time_limit_s": 100.0,
    "reward.request_deadline_s": 7.0,
}
VERIFYING_S = START_LIMIT_S + 100.0


def test_a_rank_waits_for_verifiers_as_long_as_they_may_take() -> None:
    assert longest_wait_s(build(LIMITS)) == VERIFYING_S
    assert longest_wait_s(build(LIMITS | {"rollout.request_deadline_s": 4000.0})) == 4000.0


def test_every_kind_of_reward_that_meets_in_a_call_has_its_time() -> None:
    function = LIMITS | {"reward.kind": "function"}
    assert longest_wait_s(build(function)) == START_LIMIT_S + 200.0, "together, then one at a time"
    pattern = {"reward.format": "pattern", "data.evals.a.path": "a"}
    mixed = {f"data.sources.{kind}.reward": kind for kind in ("math_answer", "reasoning_gym", "function", "remote")}
    longest_s = 4 * START_LIMIT_S + (1 + 1 + 1 + 2) * 100.0 + 7.0
    assert longest_wait_s(build(LIMITS | pattern | mixed)) == longest_s
    held_out = {f"data.evals.{kind}.reward": kind for kind in ("reasoning_gym", "function", "model")}
    assert longest_wait_s(build(LIMITS | held_out)) == 2 * START_LIMIT_S + 300.0 + 7.0


def test_groups_that_are_judged_on_the_way_lengthen_the_wait_for_a_leader() -> None:
    judged = build(LIMITS | {"schedule.dynamic_sampling": True, "schedule.max_draws": 2.0})
    assert longest_wait_s(judged) == 10.0 + 2 * VERIFYING_S
    sampling_s = 2 * (10.0 + 2 * 5.0 + 20.0)
    assert phase_deadline_s(judged, "rollout") == 3 * (sampling_s + 2 * 2 * VERIFYING_S), "three draws, two tries"
    assert phase_deadline_s(build(LIMITS), "rollout") == sampling_s


def test_servers_that_score_tokens_again_have_a_requests_time_beside_that_of_comparing_weights() -> None:
    comparing_s = phase_deadline_s(build(LIMITS), "sync")
    assert phase_deadline_s(build(LIMITS), "parity") == comparing_s + 10.0


@pytest.mark.parametrize("changes", [{}, {"schedule.dynamic_sampling": True}, {"reward.batch_time_limit_s": 1e4}])
def test_no_collective_gives_up_before_its_phase_is_over(changes: dict[str, Any]) -> None:
    config = build(changes)
    longest = max(phase_deadline_s(config, name) for name in ("rollout", "reward", "sync", "eval"))
    assert longest_wait_s(config) <= longest
    assert longest_wait_s(config) >= phase_deadline_s(config, "reward")


def test_a_rank_that_writes_a_trace_is_not_declared_dead_meanwhile() -> None:
    traced = build({"profile.steps": (1,), "watchdog.stall_deadline_s": 7.0})
    assert watchdog_of(traced).heartbeat_deadline_s >= 600 and watchdog_of(traced).stall_deadline_s == 7.0
    patient = build({"profile.steps": (1,), "watchdog.heartbeat_deadline_s": 900.0})
    for same in (patient, build({}), build({"profile.steps": (1,), "profile.record": ("memory",)})):
        assert watchdog_of(same) == same.watchdog
