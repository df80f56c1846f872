"""What must hold for every preset on any batch: random masks, lone samples, offsets, junk, order and labels."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rpp.algorithm import compute_advantages, policy_loss
from megatron_rpp.config.presets import algorithm_config
from tests.unit.algorithm.cases import PRESET_NAMES, Batch, random_batch, random_loss_case
from tests.unit.algorithm.peer_formulas import ADVANTAGES, Experience

JUNK = [float("nan"), float("inf"), -float("inf"), 1e30]
SEEDS = st.integers(0, 2**31)
few = settings(max_examples=12, deadline=None)
each_preset = pytest.mark.parametrize("preset", PRESET_NAMES)


def advantages(batch: Batch, preset: str, **overrides: Any) -> Tensor:
    return compute_advantages(**batch, preset=preset, **{"kl_coef": 0.05, **overrides})


def dirty(x: Tensor, mask: Tensor, junk: float) -> Tensor:
    return torch.where(mask != 0, x, junk)


@few
@given(
    seed=SEEDS, rows=st.integers(1, 9), columns=st.integers(1, 6), dtype=st.sampled_from(["bool", "int64", "float32"])
)
@each_preset
def test_advantages_are_finite_float64_and_zero_outside_the_mask(
    preset: str, seed: int, rows: int, columns: int, dtype: str
) -> None:
    """One row, one column, rows without tokens: no 0 / 0; the mask may be of any type."""
    batch = random_batch(seed, rows, columns)
    found = advantages({**batch, "loss_mask": batch["loss_mask"].to(getattr(torch, dtype))}, preset)
    assert found.shape == (rows, columns) and found.dtype == torch.float64
    assert found.isfinite().all() and (found[batch["loss_mask"] == 0] == 0).all()
    assert torch.equal(found, advantages(batch, preset))


@few
@given(seed=SEEDS)
@pytest.mark.parametrize(
    "preset", [p for p in PRESET_NAMES if algorithm_config(p).estimator.startswith("reinforce_pp")]
)
def test_normalized_advantages_have_mean_zero_and_variance_one_over_tokens(preset: str, seed: int) -> None:
    """Two responses with tokens differ by 100, so that the variance is far above its floor."""
    batch = random_batch(seed, pairs=True)
    batch["loss_mask"][:2] = 1
    batch["rewards"][0] += 100
    found = advantages(batch, preset, reward_clip=0.0)[batch["loss_mask"] != 0]
    assert found.mean().abs().item() < 1e-12
    squares = found.square().sum().item() / (len(found) - algorithm_config(preset).variance_ddof)
    assert squares == pytest.approx(1.0, rel=1e-9)


@few
@given(seed=SEEDS, value=st.sampled_from([0.7, -0.37, 1.7, 0.0, 1e3, -1e6]))
@each_preset
def test_equal_rewards_give_zero_advantages_never_nan(preset: str, seed: int, value: float) -> None:
    """A group whose responses are all right or all wrong teaches nothing; groups of one row aside (lone_sample)."""
    batch = random_batch(seed, pairs=True)
    batch |= {"rewards": torch.full((9,), value), "greedy_rewards": torch.full((9,), value)}
    batch["kl"] = torch.zeros(9, 6)
    assert advantages(batch, preset).abs().max().item() <= 1e-9


@few
@given(seed=SEEDS)
@pytest.mark.parametrize("preset", ["paper_baseline", "slime_baseline", "nemo_rl", "dr_grpo", "grpo", "rloo"])
def test_groups_of_one_row_alone_give_zero_advantages(preset: str, seed: int) -> None:
    """n - 1 = 0 divides nothing, and R / (0 + 1e-6) reaches no token."""
    batch = random_batch(seed)
    batch["group_ids"] = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    assert (advantages(batch, preset, kl_coef=0.0) == 0).all()


def exact(batch: Batch, preset: str) -> Tensor:
    """The peer's formula in fractions, without KL."""
    formula = ADVANTAGES[preset]
    found = formula(
        Experience(
            rewards=[Fraction(x) for x in batch["rewards"].tolist()],
            log_ratio=[[Fraction(0)] * len(row) for row in batch["loss_mask"]],
            mask=[[bool(m) for m in row] for row in batch["loss_mask"].tolist()],
            groups=batch["group_ids"].tolist(),
            greedy=[Fraction(x) for x in batch["greedy_rewards"].tolist()],
            beta=Fraction(0),
            gamma=Fraction(1),
        )
    )
    return torch.tensor(found, dtype=torch.float64)


@few
@given(seed=SEEDS, mean=st.sampled_from([1e3, -1e3, 1e6]), sd=st.sampled_from([1e-3, 1.0]))
@each_preset
def test_a_huge_offset_of_the_rewards_equals_exact_arithmetic(preset: str, seed: int, mean: float, sd: float) -> None:
    """Float32, or E[x^2] - E[x]^2 even in float64, has no digit left at mean 1e6, deviation 1e-3."""
    batch = random_batch(seed, pairs=True)
    for name in ("rewards", "greedy_rewards"):
        batch[name] = mean + sd * batch[name]
    batch["kl"] = torch.zeros(9, 6)
    found, expected = advantages(batch, preset, reward_clip=0.0), exact(batch, preset)
    if preset == "openrlhf":  # its own clip at 10 would leave only constants
        expected = exact(batch, "paper")
    largest = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * max(largest, 1e-3))


@few
@given(seed=SEEDS, offset=st.sampled_from([1e3, -4e6]))
@each_preset
def test_an_offset_of_all_rewards_changes_no_advantage(preset: str, seed: int, offset: float) -> None:
    """Every baseline and the global mean are shift-invariant. Rewards are multiples of 2^-20, so offsets are exact."""
    batch = random_batch(seed, pairs=True)
    for name in ("rewards", "greedy_rewards"):
        batch[name] = (batch[name] * 2**20).round() / 2**20
    moved = {**batch, "rewards": batch["rewards"] + offset, "greedy_rewards": batch["greedy_rewards"] + offset}
    overrides = {"reward_clip": 0.0} if preset == "openrlhf" else {}  # a clip of raw rewards is not shift-invariant
    found, expected = advantages(moved, preset, **overrides), advantages(batch, preset, **overrides)
    largest = max(expected.abs().max().item(), 1.0)
    # `folded` and `to_go` add the KL to a score of the offset's size: that rounds at offset x 1e-16.
    torch.testing.assert_close(found, expected, rtol=0, atol=largest * max(1e-12, abs(offset) * 2e-15))


@few
@given(seed=SEEDS, junk=st.sampled_from(JUNK))
@each_preset
def test_junk_in_the_kl_outside_the_mask_changes_no_advantage(preset: str, seed: int, junk: float) -> None:
    batch = random_batch(seed)
    spoilt = {**batch, "kl": dirty(batch["kl"], batch["loss_mask"], junk)}
    assert torch.equal(advantages(spoilt, preset, gamma=0.9), advantages(batch, preset, gamma=0.9))


@few
@given(seed=SEEDS)
@each_preset
def test_permuting_rows_permutes_advantages(preset: str, seed: int) -> None:
    """A baseline taken from neighbours in the batch, or by reshape(-1, n), would not."""
    batch = random_batch(seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    found, expected = advantages({k: v[order] for k, v in batch.items()}, preset), advantages(batch, preset)[order]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * max(expected.abs().max().item(), 1e-3))


@few
@given(seed=SEEDS, labels=st.permutations([0, 1, 7, 4095, 9999]))
@each_preset
def test_relabelling_groups_changes_no_advantage(preset: str, seed: int, labels: list[int]) -> None:
    """Numbers of prompts need not be dense, nor in order; test_groups has the largest that is allowed."""
    batch = random_batch(seed)
    relabelled = {**batch, "group_ids": torch.tensor(labels)[batch["group_ids"]]}
    assert torch.equal(advantages(relabelled, preset), advantages(batch, preset))


@few
@given(seed=SEEDS)
@each_preset
def test_inputs_are_left_as_they_were(preset: str, seed: int) -> None:
    """The score pass and the metrics read the same tensors afterwards."""
    batch, case = random_batch(seed), random_loss_case(seed)
    advantages(batch, preset)
    policy_loss(**case, preset=preset, **LOSS_OPTIONS)
    assert all(torch.equal(batch[name], x) for name, x in random_batch(seed).items())
    assert all(torch.equal(case[name], x) for name, x in random_loss_case(seed).items())


LOSS_OPTIONS: dict[str, Any] = {"kl_loss_coef": 0.3, "entropy_coef": 0.2, "importance_correction": "truncated"}
FIELDS = ("policy_logprobs", "old_logprobs", "advantages", "rollout_logprobs", "ref_logprobs", "entropy")


def loss_gradient_and_sums(case: Batch, preset: str, **overrides: Any) -> dict[str, Tensor]:
    leaves = {name: case[name].clone().requires_grad_() for name in ("policy_logprobs", "entropy")}
    found = policy_loss(**{**case, **leaves}, preset=preset, **LOSS_OPTIONS, **overrides)
    found.loss.backward()
    gradients = {f"d/d {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert len(gradients) == 2
    return {"loss": found.loss.detach(), **gradients, **found.sums}


@few
@given(seed=SEEDS, junk=st.sampled_from(JUNK), fields=st.sets(st.sampled_from(FIELDS), min_size=1))
@each_preset
def test_junk_outside_the_mask_reaches_neither_loss_nor_gradient_nor_metrics(
    preset: str, seed: int, junk: float, fields: set[str]
) -> None:
    """In any of the six inputs, with every term of the loss on: 0 x NaN is NaN in a backward pass too."""
    case = random_loss_case(seed)
    mask = case["loss_mask"]
    spoilt = {**case, **{name: dirty(case[name], mask, junk) for name in fields}}
    clean, found = loss_gradient_and_sums(case, preset), loss_gradient_and_sums(spoilt, preset)
    for name, value in clean.items():
        assert torch.equal(found[name], value), name
    assert (found["d/d policy_logprobs"][mask == 0] == 0).all()


@few
@given(seed=SEEDS)
@each_preset
def test_a_minibatch_without_tokens_has_zero_loss_gradient_and_metrics(preset: str, seed: int) -> None:
    case = {name: torch.full_like(x, torch.nan) for name, x in random_loss_case(seed).items()}
    case["loss_mask"] = torch.zeros_like(case["loss_mask"])
    assert all((value == 0).all() for value in loss_gradient_and_sums(case, preset).values())


@few
@given(seed=SEEDS)
@each_preset
def test_permuting_rows_leaves_the_loss_and_permutes_its_gradient(preset: str, seed: int) -> None:
    case, order = random_loss_case(seed), torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    clean = loss_gradient_and_sums(case, preset)
    found = loss_gradient_and_sums({name: x[order] for name, x in case.items()}, preset)
    for name, value in clean.items():
        expected = value[order] if name.startswith("d/d") else value
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-13)
