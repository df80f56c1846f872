"""What a user may pass by mistake: an error, or no harm; never a plausible wrong number."""

from __future__ import annotations

import warnings

import pytest
import torch

from megatron_rpp.algorithm import compute_advantages, policy_loss
from tests.unit.algorithm.cases import PRESET_NAMES, random_batch, random_loss_case


@pytest.mark.parametrize(
    ("name", "shape"), [("rewards", (9, 1)), ("kl", (9, 1)), ("group_ids", (1,)), ("greedy_rewards", (1,))]
)
def test_an_advantage_input_of_another_shape_is_an_error_that_names_it(name: str, shape: tuple[int, ...]) -> None:
    batch = {**random_batch(0), name: torch.zeros(shape, dtype=torch.int64)}
    with pytest.raises(ValueError, match=rf"{name} has shape .*; it must be \(9"):
        compute_advantages(**batch, preset="remax")


@pytest.mark.parametrize("name", ["policy_logprobs", "old_logprobs", "advantages", "rollout_logprobs", "entropy"])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (6, 1)])
def test_a_loss_input_that_would_broadcast_is_an_error_that_names_it(name: str, shape: tuple[int, ...]) -> None:
    case = {**random_loss_case(0), name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=rf"{name} has shape .*; it must be \(6, 7\)"):
        policy_loss(**case)


@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.parametrize("shape", [(2, 0), (0, 0), (0, 3)])
def test_a_rank_with_nothing_gets_nothing(preset: str, shape: tuple[int, int]) -> None:
    """It must not raise: the other ranks wait in the collectives."""
    rows, _ = shape
    found = compute_advantages(
        torch.zeros(rows), torch.zeros(shape), torch.zeros(shape), torch.zeros(rows, dtype=torch.int64),
        preset=preset, gamma=0.9, greedy_rewards=torch.zeros(rows),
    )  # fmt: skip
    assert found.shape == shape and found.sum() == 0


def test_old_logprobs_that_are_the_policys_own_do_not_cancel_the_gradient() -> None:
    """On-policy, one tensor may serve as both."""
    case = random_loss_case(1)
    logprobs = case["policy_logprobs"].requires_grad_()
    loss, _ = policy_loss(logprobs, logprobs, case["advantages"], case["loss_mask"])
    loss.backward()
    expected = -case["advantages"] * case["loss_mask"] / case["loss_mask"].sum()
    torch.testing.assert_close(logprobs.grad, expected)


@pytest.mark.parametrize("preset", ["slime", "nemo_rl"])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_an_overflowing_ratio_without_a_clamp_gives_no_nan(preset: str, advantage: float) -> None:
    logprobs = torch.tensor([[100.0, 0.0]], requires_grad=True)
    zeros = torch.zeros(1, 2)
    loss, _ = policy_loss(logprobs, zeros, zeros + advantage, zeros + 1, preset=preset)
    loss.backward()
    assert logprobs.grad is not None and logprobs.grad.isfinite().all() and loss.isfinite()


@pytest.mark.parametrize("preset", ["slime", "grpo", "dr_grpo"])
def test_a_part_of_a_step_without_its_sequence_count_is_pointed_out(preset: str) -> None:
    """Its responses would be counted alone: three parts would give three times the loss."""
    inputs = {k: v for k, v in random_loss_case(2).items() if k not in ("rollout_logprobs", "ref_logprobs", "entropy")}
    with pytest.warns(UserWarning, match="pass its global_sequence_count"):
        policy_loss(**inputs, preset=preset, global_token_count=100.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy_loss(**inputs, preset=preset)
        policy_loss(**inputs, preset=preset, global_token_count=100.0, global_sequence_count=9.0)


def test_a_whole_configuration_with_a_kl_loss_needs_the_reference() -> None:
    from megatron_rpp.config.presets import algorithm_config

    case = random_loss_case(3)
    del case["ref_logprobs"]
    with pytest.raises(ValueError, match=r"kl_loss_coef=0\.1 needs ref_logprobs"):
        policy_loss(**case, preset=algorithm_config("paper", kl_loss_coef=0.1))
