"""The three corrections for the sampler's probabilities, on numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_rpp.algorithm.importance import importance_weights
from megatron_rpp.algorithm.loss import policy_loss
from megatron_rpp.config.presets import algorithm_config
from tests.unit.algorithm.cases import random_loss_case

CORRECTIONS = ("truncated", "masked", "sequence_masked")

# pi_old / pi_rollout of two responses: geometric means (4 x 1 x 1/4)^(1/3) = 1, and 2.5 over two tokens
RATIOS = torch.tensor([[4.0, 1.0, 0.25], [2.5, 2.5, 100.0]], dtype=torch.float64)
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
WORKED: dict[str, tuple[list[list[float]], list[float]]] = {
    # weights within [0.5, 2]; metrics: their sum, tokens dropped, tokens cut to 2
    "truncated": ([[2, 1, 0.25], [2, 2, 0]], [7.25, 0, 3]),
    "masked": ([[0, 1, 0], [0, 0, 0]], [1, 4, 0]),
    "sequence_masked": ([[2, 1, 0.25], [0, 0, 0]], [3.25, 2, 1]),
}


def weights(log_ratio: Tensor, mask: Tensor, correction: str, low: float = 0.5) -> tuple[Tensor, dict[str, Tensor]]:
    settings = algorithm_config(importance_correction=correction, importance_low=low, importance_high=2.0)
    old = torch.full_like(log_ratio, -1.0)
    return importance_weights(old, old - log_ratio, mask, settings)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_weights_and_metric_sums_of_each_correction(correction: str) -> None:
    """A masked token of the sampler (ratio 100) counts in neither the weights, the mean nor the metrics."""
    found, sums = weights(RATIOS.log(), MASK, correction)
    expected, metrics = WORKED[correction]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert [sums[f"importance/{name}"].item() for name in ("weight_mean", "masked_fraction", "truncated_fraction")] == (
        pytest.approx(metrics, rel=1e-12)
    )


def test_masked_drops_below_the_lower_bound_and_truncated_does_not() -> None:
    """w = 1/4 against a lower bound of 1/2, and of 0."""
    log_ratio, mask = torch.tensor([[math.log(0.25)]], dtype=torch.float64), torch.ones(1, 1)
    assert weights(log_ratio, mask, "masked")[0].item() == 0.0
    assert weights(log_ratio, mask, "masked", low=0.0)[0].item() == pytest.approx(0.25)
    assert weights(log_ratio, mask, "sequence_masked")[0].item() == 0.0
    assert weights(log_ratio, mask, "truncated")[0].item() == pytest.approx(0.25)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_equal_samplers_change_nothing(correction: str) -> None:
    """w = 1 lies on the bounds importance_low = importance_high = 1, which are inclusive."""
    settings = algorithm_config(importance_correction=correction, importance_low=1.0, importance_high=1.0)
    logprobs = torch.full((2, 3), -0.7)
    found, sums = importance_weights(logprobs, logprobs, MASK, settings)
    assert torch.equal(found, MASK)
    assert sums["importance/masked_fraction"].item() == sums["importance/truncated_fraction"].item() == 0


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_token_that_the_sampler_found_impossible_gives_no_infinite_weight(correction: str) -> None:
    """exp(800) is inf: cut to 2, or dropped; a response without tokens stays without."""
    log_ratio = torch.tensor([[800.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    found, sums = weights(log_ratio, torch.tensor([[1.0, 1.0], [0.0, 0.0]]), correction)
    expected = {"truncated": [2.0, 1.0], "masked": [0.0, 1.0], "sequence_masked": [0.0, 0.0]}[correction]
    assert found.tolist() == [expected, [0.0, 0.0]]
    assert all(math.isfinite(value.item()) for value in sums.values())


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_the_policy_loss_and_its_gradient_are_weighted_and_the_kl_loss_is_not(correction: str) -> None:
    """Ratio 1 and A = -1: the loss of a token is its weight, the gradient too."""
    old = torch.zeros(2, 3, dtype=torch.float64)
    logprobs = old.clone().requires_grad_()
    found = policy_loss(
        logprobs,
        old,
        old - 1,
        MASK,
        global_token_count=1.0,
        rollout_logprobs=-RATIOS.log(),
        ref_logprobs=old - 0.5,
        kl_loss_coef=1.0,
        importance_correction=correction,
        importance_low=0.5,
        importance_high=2.0,
    )
    found.loss.backward()
    expected = torch.tensor(WORKED[correction][0], dtype=torch.float64)
    assert found.sums["loss/policy"].item() == pytest.approx(expected.sum().item(), rel=1e-12)
    assert found.sums["loss/kl"].item() == pytest.approx(5 * 0.125, rel=1e-12)
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, expected + 0.5 * MASK, rtol=1e-12, atol=1e-15)


def test_weights_carry_no_gradient() -> None:
    """The weight is of old against rollout; a gradient through it would push the scores of the last step."""
    log_ratio = RATIOS.log().requires_grad_()
    for correction in CORRECTIONS:
        assert not weights(log_ratio, MASK, correction)[0].requires_grad


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_junk_outside_the_mask_reaches_neither_weights_nor_metrics(correction: str, junk: float) -> None:
    settings = algorithm_config(importance_correction=correction)
    case = random_loss_case(2)
    old, rollout, mask = case["old_logprobs"], case["rollout_logprobs"], case["loss_mask"]
    clean, clean_sums = importance_weights(old, rollout, mask, settings)
    dirty_old, dirty_rollout = (torch.where(mask != 0, x, junk) for x in (old, rollout))
    for one, other in ((dirty_old, rollout), (old, dirty_rollout), (dirty_old, dirty_rollout)):
        found, sums = importance_weights(one, other, mask, settings)
        assert torch.equal(found, clean) and sums == clean_sums
