"""Dual clip, aggregation, KL loss and entropy bonus on numbers worked by hand, and in parts of a step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rpp.algorithm.loss import PolicyLoss, policy_loss
from tests.unit.algorithm.cases import PRESET_NAMES, Batch, random_loss_case


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def at_ratio(ratios: list[float], advantages: list[float], **settings: Any) -> tuple[PolicyLoss, list[float]]:
    """(loss, its gradient) of one response with these ratios, the sum over its tokens."""
    logprobs = row(*map(math.log, ratios)).requires_grad_()
    zeros = torch.zeros_like(logprobs)
    found = policy_loss(logprobs, zeros, row(*advantages), zeros + 1, global_token_count=1.0, **settings)
    found.loss.backward()
    assert logprobs.grad is not None
    return found, logprobs.grad[0].tolist()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "bounded"),
    [
        (5.0, -1.0, 3.0, 0.0, 1),  # 5 |A| is cut to 3 |A|
        (5.0, -2.0, 6.0, 0.0, 1),
        (2.0, -1.0, 2.0, 2.0, 0),  # below the bound
        (0.5, -1.0, 0.8, 0.0, 0),  # PPO's own clip
        (5.0, 1.0, -1.2, 0.0, 0),  # a good token has no such bound
        (0.01, 1.0, -0.01, -0.01, 0),
        (5.0, 0.0, 0.0, 0.0, 0),
    ],
)
def test_dual_clip_bounds_the_loss_of_a_bad_token_alone(
    ratio: float, advantage: float, loss: float, gradient: float, bounded: int
) -> None:
    """A bound on tokens with positive advantage too would be min(-r A, -3 A) = -3 A: a reward for nothing."""
    found, slope = at_ratio([ratio], [advantage], dual_clip=3.0)
    assert (found.loss.item(), slope[0]) == pytest.approx((loss, gradient), abs=1e-12)
    assert found.sums["clip/dual_fraction"].item() == bounded


def test_without_dual_clip_the_loss_of_a_bad_token_grows_and_there_is_no_such_metric() -> None:
    found, slope = at_ratio([5.0], [-1.0])
    assert (found.loss.item(), slope[0]) == pytest.approx((5.0, 5.0), rel=1e-12)
    assert "clip/dual_fraction" not in found.sums


def test_a_log_ratio_clamp_of_zero_is_off() -> None:
    """Presets `slime` and `nemo_rl`: clamp(-0, 0) would make every ratio 1."""
    found, slope = at_ratio([math.exp(25)], [-1.0], log_ratio_clamp=0.0)
    assert (found.loss.item(), slope[0]) == pytest.approx((math.exp(25), math.exp(25)), rel=1e-12)


# Responses of 1, 3 and 0 tokens, ratio 1; losses -A of the tokens 4; 1, 2, 3.
MASK = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
ADVANTAGES = torch.tensor([[-4.0, 9, 9, 9], [9, -1, -2, -3], [9, 9, 9, 9]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("settings", "loss", "gradient"),
    [
        ({"loss_aggregation": "token_mean"}, 10 / 4, [4 / 4, 1 / 4, 2 / 4, 3 / 4]),
        ({"loss_aggregation": "sequence_mean"}, (4 + 2) / 2, [4 / 2, 1 / 6, 2 / 6, 3 / 6]),
        ({"loss_aggregation": "constant", "loss_constant": 5}, 10 / (2 * 5), [4 / 10, 1 / 10, 2 / 10, 3 / 10]),
        ({"loss_aggregation": "constant"}, 10 / (2 * 4), [4 / 8, 1 / 8, 2 / 8, 3 / 8]),  # S = 4
        ({"loss_aggregation": "token_mean", "global_token_count": 8.0}, 10 / 8, [4 / 8, 1 / 8, 2 / 8, 3 / 8]),
        (
            {"loss_aggregation": "sequence_mean", "global_sequence_count": 6.0},
            (4 + 2) / 6,
            [4 / 6, 1 / 18, 2 / 18, 3 / 18],
        ),
        (
            {"loss_aggregation": "constant", "loss_constant": 5, "global_sequence_count": 4.0},
            10 / (4 * 5),
            [4 / 20, 1 / 20, 2 / 20, 3 / 20],
        ),
    ],
)
def test_each_aggregation_divides_by_its_own_count(
    settings: dict[str, Any], loss: float, gradient: list[float]
) -> None:
    """The empty response counts in none; the KL and entropy terms are divided alike (see the tests below)."""
    logprobs = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    found = policy_loss(logprobs, torch.zeros(3, 4), ADVANTAGES, MASK, **settings)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(loss, rel=1e-12)
    assert logprobs.grad is not None
    assert logprobs.grad[MASK != 0].tolist() == pytest.approx(gradient, rel=1e-12)
    assert (logprobs.grad[MASK == 0] == 0).all()
    tokens = settings.get("global_token_count", 4.0)  # a metric over tokens is sum / token count
    assert (found.sums["loss/total"] / tokens).item() == pytest.approx(loss, rel=1e-12)


# log pi = -1, -2 and log ref = -1.5, -1: k1 = 0.5, -1.
KL_LOSS = {
    "k2": ([0.125, 0.5], [0.5, -1.0]),  # k1^2 / 2, gradient k1
    "k3": ([math.exp(-0.5) - 0.5, math.e - 2], [1 - math.exp(-0.5), 1 - math.e]),  # gradient 1 - exp(-k1)
}


@pytest.mark.parametrize("estimator", KL_LOSS)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_kl_loss_is_added_with_its_weight_and_the_same_aggregation(estimator: str, aggregation: str) -> None:
    logprobs = row(-1, -2).requires_grad_()
    found = policy_loss(
        logprobs,
        row(-1, -2),
        row(0, 0),
        torch.ones(1, 2),
        ref_logprobs=row(-1.5, -1),
        kl_loss_coef=0.1,
        kl_loss_estimator=estimator,
        loss_aggregation=aggregation,
        loss_constant=4 if aggregation == "constant" else 0,
    )
    found.loss.backward()
    share = 0.1 / (4 if aggregation == "constant" else 2)
    values, slopes = KL_LOSS[estimator]
    assert found.loss.item() == pytest.approx(share * sum(values), rel=1e-12)
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([share * slope for slope in slopes], rel=1e-12)
    assert (found.sums["loss/kl"] / 2).item() == pytest.approx(found.loss.item(), rel=1e-12)
    assert found.sums["loss/policy"].item() == 0.0


def test_kl_loss_is_clamped_as_the_preset_says() -> None:
    """k2 of a log-ratio of 30 is 450; clamped at 10 it is 50, and at an output of 20 it is 20, without gradient."""
    cases: list[tuple[dict[str, Any], float]] = [
        ({}, 50.0),
        ({"kl_clamp": 0.0}, 450.0),
        ({"kl_output_clamp": 20.0}, 20.0),
    ]
    for settings, value in cases:
        logprobs = row(30).requires_grad_()
        inputs = (logprobs, row(30), row(0), torch.ones(1, 1))
        found = policy_loss(*inputs, ref_logprobs=row(0), kl_loss_coef=1.0, **settings)
        found.loss.backward()
        assert found.loss.item() == pytest.approx(value, rel=1e-14)
        assert logprobs.grad is not None and logprobs.grad.item() == (30.0 if value == 450.0 else 0.0)


def test_entropy_bonus_lowers_the_loss_and_pushes_the_entropy_up() -> None:
    """Entropies 2 and 4, weight 0.01: -0.01 x 3, gradient -0.01 / 2 at each; the third token is masked."""
    entropy = row(2, 4, 50).requires_grad_()
    zeros = torch.zeros_like(entropy).detach()
    found = policy_loss(zeros, zeros, zeros, row(1, 1, 0), entropy=entropy, entropy_coef=0.01)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(-0.03, rel=1e-12)
    assert entropy.grad is not None and entropy.grad[0].tolist() == pytest.approx([-0.005, -0.005, 0.0], rel=1e-12)
    assert (found.sums["loss/entropy"] / 2).item() == pytest.approx(-0.03, rel=1e-12)


def test_terms_add_up_to_the_total() -> None:
    case = random_loss_case(4)
    found = policy_loss(**case, kl_loss_coef=0.3, entropy_coef=0.2, importance_correction="truncated")
    terms = [found.sums[f"loss/{name}"].item() for name in ("policy", "kl", "entropy")]
    assert all(abs(term) > 1e-3 for term in terms)
    tokens = case["loss_mask"].sum().item()
    assert found.sums["loss/total"].item() == pytest.approx(sum(terms), rel=1e-12)
    assert found.loss.item() * tokens == pytest.approx(sum(terms), rel=1e-12)


OPTIONS: dict[str, Any] = {"kl_loss_coef": 0.3, "entropy_coef": 0.2, "importance_correction": "sequence_masked"}


@pytest.mark.parametrize("sizes", [[1, 5], [2, 0, 1, 3], [1] * 6])
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_parts_of_a_step_sum_to_the_loss_gradient_and_metrics_of_the_whole(preset: str, sizes: list[int]) -> None:
    """With the counts of the whole step, however rows are cut; a part without rows or tokens included."""
    case, options = random_loss_case(3), {**OPTIONS, "preset": preset, "loss_constant": 11}
    counts = {
        "global_token_count": case["loss_mask"].sum().item(),
        "global_sequence_count": float((case["loss_mask"].sum(dim=1) > 0).sum()),
    }
    assert counts["global_sequence_count"] < 6, "the case must have an empty response"

    def run(parts: list[Batch], logprobs: Tensor) -> tuple[float, Tensor, dict[str, float]]:
        found = [policy_loss(**part, **counts, **options) for part in parts]
        torch.stack([part.loss for part in found]).sum().backward()
        assert logprobs.grad is not None
        sums = {name: sum(part.sums[name].item() for part in found) for name in found[0].sums}
        return sum(part.loss.item() for part in found), logprobs.grad, sums

    whole = case["policy_logprobs"].clone().requires_grad_()
    cut = case["policy_logprobs"].clone().requires_grad_()
    pieces = {name: x.split(sizes) for name, x in {**case, "policy_logprobs": cut}.items()}
    parts = [{name: piece[i] for name, piece in pieces.items()} for i in range(len(sizes))]
    loss, gradient, sums = run([{**case, "policy_logprobs": whole}], whole)
    loss_of_parts, gradient_of_parts, sums_of_parts = run(parts, cut)
    assert loss_of_parts == pytest.approx(loss, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(gradient_of_parts, gradient, rtol=1e-12, atol=1e-15)
    assert sums_of_parts == pytest.approx(sums, rel=1e-12, abs=1e-12)


def test_counts_left_out_are_those_of_the_batch() -> None:
    case: Batch = random_loss_case(3) | {"preset": "grpo"}
    counts = {
        "global_token_count": case["loss_mask"].sum().item(),
        "global_sequence_count": float((case["loss_mask"].sum(dim=1) > 0).sum()),
    }
    for aggregation in ("token_mean", "sequence_mean", "constant"):
        given = policy_loss(**case, **counts, loss_aggregation=aggregation)
        assert policy_loss(**case, loss_aggregation=aggregation).loss.item() == given.loss.item()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"importance_correction": "masked"}, "importance_correction=masked needs rollout_logprobs"),
        ({"kl_loss_coef": 0.1}, "kl_loss_coef=0.1 needs ref_logprobs"),
        ({"entropy_coef": 0.1}, "entropy_coef=0.1 needs entropy"),
        ({"clip_eps": 0.1}, "unknown setting clip_eps; did you mean clip_eps_low?"),
        ({"preset": "papr"}, "algorithm.preset=papr must be one of: paper, paper_baseline, "),
    ],
)
def test_a_setting_without_its_input_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    """Left out in silence, an entropy bonus or a correction would be one that no code applies."""
    with pytest.raises(ValueError) as caught:
        policy_loss(row(0), row(0), row(0), row(1), **settings)
    assert str(caught.value).startswith(message)


def test_a_presets_own_kl_loss_is_left_out_without_a_reference() -> None:
    """`paper_baseline` in a notebook without a reference: the policy term alone, and no loss/kl that reads 0."""
    inputs = (row(0.1), row(0), row(2), row(1))
    assert "loss/kl" not in policy_loss(*inputs, preset="paper_baseline").sums
    assert "loss/kl" in policy_loss(*inputs, preset="paper_baseline", ref_logprobs=row(0)).sums
