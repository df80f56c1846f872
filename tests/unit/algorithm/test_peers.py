"""Every preset against its system's published formulas, on random inputs, in exact or float64 arithmetic."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rpp.algorithm import compute_advantages, policy_loss
from megatron_rpp.algorithm.kl import reward_kl
from megatron_rpp.config.presets import PRESETS, algorithm_config
from tests.unit.algorithm.cases import PRESET_NAMES, Batch, random_batch, random_loss_case
from tests.unit.algorithm.peer_formulas import ADVANTAGES, DR_GRPO_CONSTANT, LOSSES, Experience, LossInputs

REINFORCE_PP = ("paper", "openrlhf", "verl", "slime")  # the presets that read gamma


def experience(batch: Batch, log_ratio: Tensor, beta: float, gamma: float = 1.0) -> Experience:
    return Experience(
        rewards=[Fraction(x) for x in batch["rewards"].tolist()],
        log_ratio=[[Fraction(x) for x in row] for row in log_ratio.tolist()],
        mask=[[bool(m) for m in row] for row in batch["loss_mask"].tolist()],
        groups=batch["group_ids"].tolist(),
        greedy=[Fraction(x) for x in batch["greedy_rewards"].tolist()],
        beta=Fraction(beta),
        gamma=Fraction(gamma),
    )


def found_and_expected(preset: str, batch: Batch, log_ratio: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """Ours, with the KL that the preset estimates from log pi_old = log_ratio and log pi_ref = 0; the peer's."""
    kl = reward_kl(log_ratio, torch.zeros_like(log_ratio), preset=preset)
    ours = compute_advantages(**{**batch, "kl": kl}, preset=preset, **settings)
    beta = settings.get("kl_coef", algorithm_config(preset).kl_coef)
    theirs = ADVANTAGES[preset](experience(batch, log_ratio, beta, settings.get("gamma", 1.0)))
    return ours, torch.tensor(theirs, dtype=torch.float64)


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    largest = expected.abs().max().item()
    assert largest > 1e-3, "the case must have advantages to prove anything"
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * largest)


def test_every_preset_has_a_formula() -> None:
    assert set(ADVANTAGES) == set(LOSSES) == set(PRESETS)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_advantages_of_the_preset_as_it_stands(preset: str, seed: int) -> None:
    """Rows without tokens, one-token responses, holes and groups of one row are among the nine."""
    batch = random_batch(seed)
    assert_same(*found_and_expected(preset, batch, batch["kl"]))


@pytest.mark.parametrize("beta", [0.05, 1.0])
@pytest.mark.parametrize("preset", [name for name in PRESET_NAMES if algorithm_config(name).kl_placement != "none"])
def test_advantages_with_the_peers_kl_switched_on(preset: str, beta: float) -> None:
    """verl, slime and NeMo-RL ship beta = 0; the placement and the clamps show only with another."""
    for seed in range(3):
        batch = random_batch(seed)
        log_ratio = 3 * batch["kl"]
        log_ratio[0, 3:] = torch.tensor([15.0, -15.0, 35.0])  # beyond the clamps at 10 and 20
        batch["loss_mask"][0] = 1
        assert_same(*found_and_expected(preset, batch, log_ratio, kl_coef=beta))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("preset", REINFORCE_PP)
def test_discount_over_response_tokens_or_over_all(preset: str, gamma: float) -> None:
    for seed in range(3):
        batch = random_batch(seed, columns=9)
        assert_same(*found_and_expected(preset, batch, batch["kl"], kl_coef=0.05, gamma=gamma))


def test_the_two_ways_to_discount_differ_on_these_cases() -> None:
    """Else the test above could not tell verl from slime."""
    batch = random_batch(0, columns=9)
    one, other = (ADVANTAGES[name](experience(batch, batch["kl"], 0.05, 0.5)) for name in ("verl", "slime"))
    assert (torch.tensor(one) - torch.tensor(other)).abs().max() > 0.01


@pytest.mark.parametrize("preset", ["openrlhf", "openrlhf_baseline"])
def test_openrlhf_clips_scores_at_10_after_the_baseline(preset: str) -> None:
    """Rewards of deviation 20: most are cut, and a cut before the baseline would differ."""
    batch = random_batch(5)
    batch["rewards"] = 20 * batch["rewards"]
    found, expected = found_and_expected(preset, batch, batch["kl"])
    assert_same(found, expected)
    early = {**batch, "rewards": batch["rewards"].clamp(-10, 10)}
    differs = (found_and_expected(preset, early, batch["kl"])[0] - found).abs().max() > 0.01
    assert differs == (preset == "openrlhf_baseline")


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_advantages_near_the_variance_floor(preset: str) -> None:
    """Standard deviation 1e-4: clamp against add, and ddof, differ in the first digit."""
    batch = random_batch(6)
    batch["rewards"], batch["greedy_rewards"] = 1e-4 * batch["rewards"], 1e-4 * batch["greedy_rewards"]
    found, expected = found_and_expected(preset, batch, 1e-4 * batch["kl"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11 * expected.abs().max().item())


def inputs_of(case: Batch) -> LossInputs:
    names = ("policy_logprobs", "old_logprobs", "ref_logprobs", "advantages", "loss_mask")
    new, old, ref, advantages, mask = (case[name].double() for name in names)
    return LossInputs(new.clone().requires_grad_(), old, ref, advantages, mask)


def assert_same_loss(preset: str, case: Batch) -> Tensor:
    """Loss and gradient equal the plain formula's; returns the gradient."""
    theirs, constant = inputs_of(case), DR_GRPO_CONSTANT if preset == "dr_grpo" else 0
    expected = LOSSES[preset](theirs)
    expected.backward()
    logprobs = case["policy_logprobs"].clone().requires_grad_()
    found = policy_loss(**{**case, "policy_logprobs": logprobs}, preset=preset, loss_constant=constant)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert logprobs.grad is not None and theirs.new.grad is not None
    torch.testing.assert_close(logprobs.grad, theirs.new.grad, rtol=1e-12, atol=1e-14)
    return logprobs.grad


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [0.4, 2.0])
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_policy_loss_and_its_gradient(preset: str, spread: float, seed: int) -> None:
    """At spread 2 many ratios are above 3, where verl's dual clip acts."""
    assert (assert_same_loss(preset, random_loss_case(seed, spread=spread)) != 0).any()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_policy_loss_at_log_ratios_beyond_20(preset: str, sign: float) -> None:
    """A bad token at log-ratio 25, a good one at -25. Only slime and NeMo-RL let the former's gradient through."""
    case = random_loss_case(7)
    case["policy_logprobs"][0, 0] = case["old_logprobs"][0, 0] + 25 * sign
    case["ref_logprobs"][0, 0] = case["policy_logprobs"][0, 0] - 0.1
    case["advantages"][0, 0] = -sign
    gradient = assert_same_loss(preset, case)[0, 0].abs().item()
    assert (gradient > 1e6) == (sign > 0 and preset in ("slime", "slime_baseline", "nemo_rl"))
