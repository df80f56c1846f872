"""The clipped policy loss against numbers worked by hand and a plain float64 loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rpp.algorithm.loss import policy_loss
from tests.unit.algorithm.cases import Batch


def loss_and_gradient(log_ratio: float, advantage: float, **settings: Any) -> tuple[float, float]:
    logprobs = torch.tensor([[-1.0 + log_ratio]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    loss = policy_loss(logprobs, -one, one * advantage, one, global_token_count=1.0, **settings).loss
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),  # the first step: -A, gradient -A
        (1.25, 1.0, -1.25, -1.25),  # below 1 + high
        (1.5, 1.0, -1.3, 0.0),  # clipped at 1 + high
        (1.5, -1.0, 1.5, 1.5),  # too likely and bad: never clipped
        (0.5, 1.0, -0.5, -0.5),  # too unlikely and good: never clipped
        (0.5, -1.0, 0.9, 0.0),  # clipped at 1 - low
        (0.95, -1.0, 0.95, 0.95),  # above 1 - low
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clip_low_and_high_are_separate_and_pessimistic(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    found = loss_and_gradient(math.log(ratio), advantage, clip_eps_low=0.1, clip_eps_high=0.3)
    assert found == pytest.approx((loss, gradient), abs=1e-12)


def test_log_ratio_clamp_bounds_an_unclipped_loss_and_stops_its_gradient() -> None:
    loss, gradient = loss_and_gradient(50.0, -1.0, log_ratio_clamp=3.0)
    assert loss == pytest.approx(math.exp(3.0)) and gradient == 0.0
    loss, gradient = loss_and_gradient(-50.0, 1.0, log_ratio_clamp=3.0)
    assert loss == pytest.approx(-math.exp(-3.0)) and gradient == 0.0
    assert loss_and_gradient(800.0, -1.0)[0] == pytest.approx(math.exp(20.0))  # the default; exp(800) is inf


def random_case() -> Batch:
    g = torch.Generator().manual_seed(11)

    def randn() -> Tensor:
        return torch.randn(6, 9, generator=g, dtype=torch.float64)

    old = randn() - 3
    mask = (torch.rand(6, 9, generator=g) < 0.6).double()
    return {
        "policy_logprobs": old + 0.4 * randn(),
        "old_logprobs": old,
        "advantages": randn(),
        "loss_mask": mask * (torch.arange(6) != 2)[:, None],
    }


def by_hand(case: Batch, low: float, high: float) -> tuple[float, list[list[float]], int, float]:
    """(loss sum, its gradient, clipped tokens, ratio sum) in a plain loop."""
    total, clipped, ratios = 0.0, 0, 0.0
    gradient = torch.zeros(6, 9).tolist()
    for b in range(6):
        for t in range(9):
            new, old, advantage, inside = (case[k][b, t].item() for k in case)
            if not inside:
                continue
            ratio = math.exp(new - old)
            bounded = min(max(ratio, 1 - low), 1 + high)
            total -= min(ratio * advantage, bounded * advantage)
            is_clipped = bounded * advantage < ratio * advantage
            gradient[b][t] = 0.0 if is_clipped else -ratio * advantage
            clipped, ratios = clipped + is_clipped, ratios + ratio
    return total, gradient, clipped, ratios


def test_loss_gradient_and_metric_sums_equal_a_plain_loop() -> None:
    case = random_case()
    total, gradient, clipped, ratios = by_hand(case, 0.15, 0.25)
    logprobs = case["policy_logprobs"].requires_grad_()
    result = policy_loss(**case, global_token_count=40.0, clip_eps_low=0.15, clip_eps_high=0.25)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(total / 40, rel=1e-12)
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor(gradient, dtype=torch.float64) / 40)
    assert clipped > 3, "the case must clip some tokens to prove anything"
    found = {name: value.item() for name, value in result.sums.items()}
    expected = {"loss/policy": total, "loss/total": total, "ratio/mean": ratios, "clip/fraction": clipped}
    assert found == pytest.approx(expected, rel=1e-12)
    assert not any(value.requires_grad for value in result.sums.values())


@pytest.mark.parametrize("sizes", [[1, 5], [2, 1, 3], [1] * 6])
def test_microbatches_sum_to_the_loss_and_gradient_of_the_whole(sizes: list[int]) -> None:
    """A mean per microbatch would weight short responses more."""
    case = random_case()
    count = case["loss_mask"].sum().item()
    whole = case["policy_logprobs"].clone().requires_grad_()
    expected = policy_loss(**{**case, "policy_logprobs": whole}, global_token_count=count)
    expected.loss.backward()
    logprobs = case["policy_logprobs"].clone().requires_grad_()
    pieces = zip(*(x.split(sizes) for x in {**case, "policy_logprobs": logprobs}.values()), strict=True)
    losses = [policy_loss(*piece, global_token_count=count).loss for piece in pieces]
    torch.stack(losses).sum().backward()
    assert torch.stack(losses).sum().item() == pytest.approx(expected.loss.item(), rel=1e-12)
    torch.testing.assert_close(logprobs.grad, whole.grad)


@pytest.mark.parametrize("field", ["policy_logprobs", "old_logprobs", "advantages"])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_junk_outside_the_mask_reaches_neither_loss_nor_gradient_nor_metrics(field: str, junk: float) -> None:
    case = random_case()
    dirty = {**case, field: torch.where(case["loss_mask"] != 0, case[field], junk)}
    results = []
    for inputs in (case, dirty):
        logprobs = inputs["policy_logprobs"].clone().requires_grad_()
        result = policy_loss(**{**inputs, "policy_logprobs": logprobs}, global_token_count=7.0)
        result.loss.backward()
        results.append([result.loss.detach(), logprobs.grad, *result.sums.values()])
    for clean, found in zip(*results, strict=True):
        assert torch.equal(clean, found)
    assert (results[1][1][case["loss_mask"] == 0] == 0).all()


def test_a_minibatch_without_tokens_has_zero_loss_and_zero_gradient() -> None:
    logprobs = torch.full((2, 3), torch.nan, requires_grad=True)
    zeros = torch.zeros(2, 3)
    result = policy_loss(logprobs, zeros, zeros, zeros, global_token_count=1.0)
    result.loss.backward()
    assert result.loss.item() == 0.0 and logprobs.grad is not None and (logprobs.grad == 0).all()
    assert all(value.item() == 0.0 for value in result.sums.values())
