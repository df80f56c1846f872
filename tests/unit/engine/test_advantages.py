"""What the engine adds to the pure objective: shaping in its order, and state from step to step."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rpp.algorithm.shaping import RunningMoments
from megatron_rpp.config.presets import algorithm_config
from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import AlgorithmConfig, Config
from megatron_rpp.engine import advantages as module
from megatron_rpp.engine.advantages import ShapingState, add_advantages, shaped_rewards
from megatron_rpp.experience.types import ExperienceBatch

WIDTH = 6


def make_batch(lengths: list[int], rewards: list[float]) -> ExperienceBatch:
    mask = (torch.arange(WIDTH) < torch.tensor(lengths)[:, None]).float()
    zeros = torch.zeros_like(mask)
    return ExperienceBatch(
        tokens=zeros.long(),
        loss_mask=mask,
        rollout_logprobs=zeros,
        rewards=torch.tensor(rewards),
        group_ids=torch.arange(len(rewards)) // 2,
        old_logprobs=zeros + 0.5,
        ref_logprobs=zeros,
    )


def config(**reward: Any) -> Config:
    return Config(reward=RewardConfig(**reward), rollout=RolloutConfig(max_response_tokens=WIDTH))


def shaped(batch: ExperienceBatch, settings: Config) -> list[float]:
    return shaped_rewards(batch, settings, lambda x: x, RunningMoments())[0].tolist()


def test_rewards_are_left_alone_by_default() -> None:
    assert shaped(make_batch([6, 1, 0, 3], [1.0, 0.5, 7.0, -2.0]), config()) == [1.0, 0.5, 7.0, -2.0]


def test_overlong_penalty_counts_response_tokens_up_to_the_longest_response() -> None:
    """Buffer 4 of 6: lengths 2, 4, 6 lose 0, 1, 2."""
    batch = make_batch([2, 4, 6, 0], [1.0, 1.0, 1.0, 1.0])
    assert shaped(batch, config(overlong_buffer_tokens=4, overlong_penalty=2.0)) == [1.0, 0.0, -1.0, 1.0]


def test_group_normalization_comes_after_the_penalty() -> None:
    """Equal rewards, but the second response of the group is too long: +1 and -1."""
    batch = make_batch([2, 6], [1.0, 1.0])
    assert shaped(batch, config(overlong_buffer_tokens=4, normalization="group")) == pytest.approx([1.0, -1.0])
    assert shaped(batch, config(normalization="group")) == [0.0, 0.0]


def run(
    monkeypatch: pytest.MonkeyPatch, batch: ExperienceBatch, settings: Config, state: ShapingState
) -> tuple[ExperienceBatch, ShapingState, dict[str, float]]:
    monkeypatch.setattr(module, "sum_over", lambda group: lambda x: x)
    group = SimpleNamespace(size=lambda: 1)
    parallel: Any = SimpleNamespace(dp_group=None, is_last_stage=True, pp_group=group, pp_size=1, device=None)
    return add_advantages(batch, settings, parallel, state)


def test_running_normalization_goes_on_from_the_last_steps_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """1, 3, then 5, 7: mean 4, population variance 5; the second batch becomes (1, 3) / sqrt 5."""
    settings = config(normalization="running")
    _, state, first = run(monkeypatch, make_batch([2, 2], [1.0, 3.0]), settings, ShapingState())
    _, state, second = run(monkeypatch, make_batch([2, 2], [5.0, 7.0]), settings, state)
    assert (state.rewards.count, state.rewards.mean, state.rewards.squares) == (4.0, 4.0, 20.0)
    assert first["reward/shaped_mean"] == 0.0
    assert second["reward/shaped_mean"] == pytest.approx(2 / 5**0.5)


def test_adaptive_kl_coef_is_used_one_step_after_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """KL 0.5 per token against a target of 0.1 is far too high: up by 20 % of 2 / 20 responses."""
    settings = replace(config(), algorithm=AlgorithmConfig(kl_coef=0.1, kl_target=0.1, kl_horizon=20))
    batch = make_batch([1, 3], [1.0, 0.0])
    first, state, metrics = run(monkeypatch, batch, settings, ShapingState())
    assert metrics["kl/coef"] == 0.1
    assert state.kl_coef == pytest.approx(0.1 * 1.02)
    second, _, metrics = run(monkeypatch, batch, settings, state)
    assert metrics["kl/coef"] == state.kl_coef
    assert first.advantages is not None and second.advantages is not None
    assert not torch.equal(first.advantages, second.advantages), "the state's kl_coef was not used"


@pytest.mark.parametrize(("kl_target", "used"), [(0.0, 0.01), (0.1, 0.7)])
def test_without_a_controller_a_resumed_run_takes_the_present_kl_coef(
    monkeypatch: pytest.MonkeyPatch, kl_target: float, used: float
) -> None:
    settings = replace(config(), algorithm=AlgorithmConfig(kl_coef=0.01, kl_target=kl_target))
    state = ShapingState.from_dict(asdict(ShapingState(0.7, RunningMoments(2.0, 1.0, 0.5))))
    _, following, metrics = run(monkeypatch, make_batch([2, 2], [1.0, 0.0]), settings, state)
    assert metrics["kl/coef"] == used
    assert following.rewards == RunningMoments(2.0, 1.0, 0.5)


def test_a_controller_that_a_resumed_run_turns_on_starts_at_the_configured_kl_coef(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A coefficient that was 0 would stay 0 for ever."""
    off = replace(config(), algorithm=AlgorithmConfig(kl_coef=0.0))
    _, saved, _ = run(monkeypatch, make_batch([2, 2], [1.0, 0.0]), off, ShapingState())
    on = replace(config(), algorithm=AlgorithmConfig(kl_coef=0.01, kl_target=0.1))
    resumed = ShapingState.from_dict(asdict(saved))
    assert run(monkeypatch, make_batch([2, 2], [1.0, 0.0]), on, resumed)[2]["kl/coef"] == 0.01


def test_a_checkpoint_from_before_there_was_shaping_starts_afresh() -> None:
    assert ShapingState.from_dict({}) == ShapingState()


def test_kl_metric_is_the_token_mean_and_is_left_out_without_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """KL 0.5 at each of the four response tokens; padding does not count."""
    batch = make_batch([1, 3], [1.0, 0.0])
    assert run(monkeypatch, batch, config(), ShapingState())[2]["kl/mean"] == pytest.approx(0.5)
    without = replace(config(), algorithm=algorithm_config("dr_grpo"))
    found, _, metrics = run(monkeypatch, replace(batch, ref_logprobs=None), without, ShapingState())
    assert "kl/mean" not in metrics and found.advantages is not None
    assert found.advantages[0, 0] == 0.5
