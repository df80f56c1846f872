"""How long the parts of a run may take, by their own limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron_rpp.config.data import SourceConfig
from megatron_rpp.config.job import WatchdogConfig
from megatron_rpp.config.reward import START_LIMIT_S
from megatron_rpp.config.rollout import MOST_ROUNDS
from megatron_rpp.config.schema import Config
from megatron_rpp.config.sources import held_out_sources, training_sources

_TRIES = {"math_answer": 1, "reasoning_gym": 1, "function": 2}
"""Times reward.batch_time_limit_s that a call of a kind may take; responses go to a function together, then singly."""
_TRACE_S = 600.0  # the longest that torch's profiler may hold the interpreter when it stops


def longest_wait_s(config: Config) -> float:
    """The longest that ranks may have to wait in one collective, for one that talks to a server or to verifiers."""
    rollout, sync = config.rollout, config.weight_sync
    sampling_s = rollout.request_deadline_s + _judging_s(config)
    return max(sampling_s, rollout.startup_deadline_s, sync.deadline_s, _verifying_s(config))


def phase_deadline_s(config: Config, name: str) -> float:
    """The time that a phase's own deadlines give it, all tries together; 0 where it has none."""
    rollout, tries = config.rollout, config.rollout.max_retries + 1
    sync_s = tries * config.weight_sync.deadline_s + rollout.startup_deadline_s
    sampling_s = tries * (rollout.request_deadline_s + sync_s)
    verifying_s = _verifying_s(config)
    rounds = MOST_ROUNDS if config.schedule.dynamic_sampling else 1
    rollout_s = rounds * (sampling_s + tries * _judging_s(config))
    parity_s = sync_s + rollout.request_deadline_s  # weights are compared, then servers score tokens again
    own = {"rollout": rollout_s, "reward": verifying_s, "parity": parity_s, "sync": sync_s}
    return own.get(name, 2 * (sampling_s + verifying_s) if name in ("eval", "baseline") else 0.0)


def watchdog_of(config: Config) -> WatchdogConfig:
    """Section `watchdog`, its heartbeat deadline raised for a run that records traces.

    While torch's profiler stops, no other thread of its rank runs, the one of the heartbeat neither.
    """
    profile, given = config.profile, config.watchdog
    if not (profile.steps and "trace" in profile.record):
        return given
    return replace(given, heartbeat_deadline_s=max(given.heartbeat_deadline_s, _TRACE_S))


def _verifying_s(config: Config) -> float:
    """Of one call of the reward, of training or held-out responses: what each of their kinds may take, and the form.

    Verifiers start at their first call.
    """
    form_s = START_LIMIT_S + config.reward.batch_time_limit_s if config.reward.format == "pattern" else 0.0
    return max(form_s + _kinds_s(config, training_sources(config.data)), _kinds_s(config, held_out_sources(config)))


def _kinds_s(config: Config, sources: Mapping[str, SourceConfig]) -> float:
    kinds, reward = {source.reward or config.reward.kind for source in sources.values()}, config.reward
    return sum(
        START_LIMIT_S + _TRIES[kind] * reward.batch_time_limit_s if kind in _TRIES else reward.request_deadline_s
        for kind in kinds
    )


def _judging_s(config: Config) -> float:
    """Of the calls of the reward while a step is sampled: about one for each num_prompts groups that are drawn."""
    return config.schedule.max_draws * _verifying_s(config) if config.schedule.dynamic_sampling else 0.0
