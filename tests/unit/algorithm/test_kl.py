"""KL estimators on numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rpp.algorithm.kl import kl_estimate, reward_kl
from megatron_rpp.config.presets import algorithm_config
from tests.unit.algorithm.cases import PRESET_NAMES

POLICY = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64)
REFERENCE = torch.tensor([[-1.5, -1.0, -0.5]], dtype=torch.float64)

# k1 = log pi - log ref = 0.5, -1, 0
# k2 = k1^2 / 2         = 0.125, 0.5, 0
# k3 = exp(-k1) - 1 + k1 = e^-0.5 - 0.5, e - 2, 0
WORKED = {
    "k1": [0.5, -1.0, 0.0],
    "k2": [0.125, 0.5, 0.0],
    "k3": [0.10653065971263342, 0.7182818284590451, 0.0],
}


@pytest.mark.parametrize("estimator", WORKED)
def test_estimator_matches_the_worked_numbers(estimator: str) -> None:
    assert kl_estimate(POLICY, REFERENCE, estimator)[0].tolist() == pytest.approx(WORKED[estimator], abs=1e-15)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [10.0, -10.0, 3.0]),
        ("k2", [50.0, 50.0, 4.5]),
        ("k3", [9 + math.exp(-10), math.exp(10) - 11, 2 + math.exp(-3)]),
    ],
)
def test_clamp_bounds_the_log_ratio_before_the_estimator_on_both_sides(estimator: str, expected: list[float]) -> None:
    policy = torch.tensor([[0.0, -30.0, -1.0]], dtype=torch.float64)
    reference = torch.tensor([[-30.0, 0.0, -4.0]], dtype=torch.float64)
    assert kl_estimate(policy, reference, estimator, clamp=10.0)[0].tolist() == pytest.approx(expected, rel=1e-13)


def test_no_clamp_leaves_a_large_log_ratio() -> None:
    assert kl_estimate(torch.tensor([[0.0]]), torch.tensor([[-30.0]]), "k1", clamp=None).item() == 30.0


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", [6.0, -6.0, 3.0]), ("k2", [6.0, 6.0, 4.5]), ("k3", [6.0, 6.0, 2 + math.exp(-3)])],
)
def test_output_clamp_bounds_the_estimate_after_the_clamp_of_the_log_ratio(
    estimator: str, expected: list[float]
) -> None:
    """Log-ratios 30, -30, 3: clamped to 10, -10, 3, then the estimates to +-6."""
    policy, reference = torch.tensor([0.0, -30, -1], dtype=torch.float64), torch.tensor([-30.0, 0, -4])
    found = kl_estimate(policy, reference, estimator, clamp=10.0, output_clamp=6.0)
    assert found.tolist() == pytest.approx(expected, rel=1e-13)


def test_a_clamp_of_zero_is_off_and_does_not_zero_the_estimate() -> None:
    """In the configuration 0 means no clamp; clamp(-0, 0) would silence the penalty."""
    assert kl_estimate(torch.tensor([3.0]), torch.tensor([0.0]), "k1", clamp=0.0, output_clamp=0.0).item() == 3.0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_gradient_is_zero_where_a_clamp_is_reached(estimator: str) -> None:
    """A token far from the reference must not throw the whole step; within the clamp the gradient stays."""
    policy = torch.tensor([12.0, -12.0, 0.5], dtype=torch.float64, requires_grad=True)
    kl_estimate(policy, torch.zeros(3, dtype=torch.float64), estimator, clamp=10.0).sum().backward()
    within = {"k1": 1.0, "k2": 0.5, "k3": 1 - math.exp(-0.5)}[estimator]
    assert policy.grad is not None and policy.grad.tolist() == pytest.approx([0.0, 0.0, within], rel=1e-13)


# The estimate that each preset puts into the reward, at log-ratios 30, -30 and 3.
CLAMPED, FREE = [10.0, -10.0, 3.0], [30.0, -30.0, 3.0]
OF_PRESET = dict.fromkeys(PRESET_NAMES, CLAMPED) | {
    "verl": FREE,
    "verl_baseline": FREE,
    "slime": FREE,
    "slime_baseline": FREE,
    "nemo_rl": [10.0, 10.0, 2 + math.exp(-3)],  # k3 of +-20 is 19 and 4.9e8; the output clamp is 10
}


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_estimator_and_clamps_of_each_preset(preset: str) -> None:
    policy, reference = torch.tensor([[0.0, -30, -1]], dtype=torch.float64), torch.tensor([[-30.0, 0, -4]])
    found = reward_kl(policy, reference, preset=preset)
    assert found[0].tolist() == pytest.approx(OF_PRESET[preset], rel=1e-13)


def test_nemo_rl_clamps_the_log_ratio_at_20_before_the_estimate() -> None:
    """Without the output clamp: k3(30) = exp(-20) - 1 + 20; unclamped it would be 29."""
    settings = algorithm_config("nemo_rl", kl_output_clamp=0.0)
    found = reward_kl(torch.tensor([30.0], dtype=torch.float64), torch.tensor([0.0]), preset=settings)
    assert found.item() == pytest.approx(19 + math.exp(-20), rel=1e-14)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expectation_under_the_policy_is_the_kl_divergence(estimator: str) -> None:
    """Fails for a swapped ratio: k1 and k3 are unbiased for KL(policy || reference) only."""
    policy = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    reference = torch.tensor([[0.3, 0.3, 0.4]], dtype=torch.float64)
    exact = sum(p * math.log(p / q) for p, q in zip(policy[0].tolist(), reference[0].tolist(), strict=True))
    estimates = kl_estimate(policy.log(), reference.log(), estimator)
    assert (policy * estimates).sum().item() == pytest.approx(exact, rel=1e-12)


def test_k2_as_a_loss_has_the_log_ratio_as_its_gradient() -> None:
    policy = POLICY.clone().requires_grad_()
    kl_estimate(policy, REFERENCE, "k2").sum().backward()
    assert policy.grad is not None and policy.grad[0].tolist() == pytest.approx([0.5, -1.0, 0.0])


def test_unknown_estimator_error_names_the_key_and_the_choices() -> None:
    with pytest.raises(ValueError, match=r"kl_estimator=k4.*k1, k2, k3"):
        kl_estimate(POLICY, REFERENCE, "k4")


def test_k3_of_a_small_log_ratio_keeps_its_digits_in_float32() -> None:
    """exp(-k1) - 1 + k1 in float32 is 26 % low on average here, and now and then negative."""
    k1 = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 1e-4
    found = kl_estimate(k1, torch.zeros_like(k1), "k3")
    assert (found >= 0).all()
    assert found.double().mean().item() == pytest.approx((k1.double().square() / 2).mean().item(), rel=1e-3)
