"""Errors that REINFORCE++ users met in other systems, one named test each.

Those that live in the engine or the configuration are tested where that is:

| error | test, under tests/ |
|---|---|
| whitening by a part of the ranks of the batch | distributed/test_advantages_on_ranks.py; here for CP slices |
| whitening that deadlocks under PP | distributed/test_layout_invariance.py (pp2, pp2_vpp2, tp2_pp2) |
| Megatron's cp / num_microbatches on the loss of a 2-tuple loss function | unit/engine/test_loss_scale.py |
| configuration keys that no code reads | unit/config/test_keys_are_read.py |
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_rpp.algorithm import compute_advantages, policy_loss
from megatron_rpp.algorithm.masked import ReduceSum, global_moments, whiten
from megatron_rpp.config.presets import algorithm_config
from tests.unit.algorithm.cases import PRESET_NAMES, Batch, Ranks, one_rank, random_batch, random_loss_case

WHITENED = [name for name in PRESET_NAMES if algorithm_config(name).estimator.startswith("reinforce_pp")]


def one_pass_float32(values: list[float]) -> np.ndarray:
    """The error: (x - E[x]) rsqrt((E[x^2] - E[x]^2) n / (n - 1) + 1e-8) in float32, summed in order."""
    x, n = np.asarray(values, dtype=np.float32), np.float32(len(values))
    mean = np.cumsum(x)[-1] / n
    variance = (np.cumsum(x * x)[-1] / n - mean * mean) * n / (n - np.float32(1))
    with np.errstate(invalid="ignore"):
        return np.asarray((x - mean) / np.sqrt(variance + np.float32(1e-8)))


def one_token_responses(rewards: Tensor, preset: str) -> Tensor:
    """Advantages [B] without KL; each response is of one token, all to one prompt."""
    zeros = torch.zeros(len(rewards), 1)
    group_ids = torch.zeros(len(rewards), dtype=torch.int64)
    return compute_advantages(rewards, zeros, zeros + 1, group_ids, preset=preset, kl_coef=0.0)[:, 0]


@pytest.mark.parametrize(("value", "count"), [(0.7, 32), (-0.37, 64), (1.7, 256)])
@pytest.mark.parametrize("preset", WHITENED)
def test_float32_one_pass_whitening_of_equal_rewards_is_nan(preset: str, value: float, count: int) -> None:
    """A step whose responses all score alike destroyed the policy."""
    assert np.isnan(one_pass_float32([value] * count)).all(), "the case must show the error"
    assert one_token_responses(torch.full((count,), value), preset).abs().max().item() < 1e-9


@pytest.mark.parametrize(("mean", "sd", "count", "seen"), [(10.0, 1e-3, 400, 10.0), (1.0, 1e-4, 500, 0.28)])
@pytest.mark.parametrize("preset", WHITENED)
def test_float32_one_pass_whitening_of_a_narrow_batch_has_another_scale(
    preset: str, mean: float, sd: float, count: int, seen: float
) -> None:
    """Standard deviation 10.0 or 0.28 in place of 1: the learning rate of that step, by chance."""
    g = torch.Generator().manual_seed(0)
    rewards = mean + sd * torch.randn(count, generator=g, dtype=torch.float64)
    assert one_pass_float32(rewards.tolist()).std() == pytest.approx(seen, rel=0.02), "the case must show the error"
    settings = algorithm_config(preset)
    variance = rewards.var(correction=settings.variance_ddof).item()
    floor = variance + 1e-8 if settings.variance_floor == "add" else max(variance, 1e-8)
    scale = (rewards.var(correction=0).item() / floor) ** 0.5  # 1, but for the floor
    # openrlhf clips at 10 what is near 10
    found = one_token_responses(rewards - mean if preset == "openrlhf" else rewards, preset)
    assert found.std(correction=0).item() == pytest.approx(scale, rel=1e-9)
    assert found.mean().abs().item() < 1e-11


def ranks_run(batches: list[Batch], preset: str) -> tuple[list[Tensor], Ranks]:
    def work(rank: int, reduce_sum: ReduceSum) -> Tensor:
        return compute_advantages(**batches[rank], preset=preset, reduce_sum=reduce_sum, kl_coef=0.05)

    ranks = Ranks(len(batches))
    return ranks.run(work), ranks


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_a_rank_with_an_empty_mask_still_joins_every_reduce(preset: str) -> None:
    """It skipped the all-reduce, and every other rank hung; here that breaks the barrier."""
    batch, empty = random_batch(1), random_batch(2)
    empty["loss_mask"][:] = 0
    found, ranks = ranks_run([batch, empty], preset)
    assert ranks.calls[0] == ranks.calls[1]
    assert (found[1] == 0).all() and found[0].abs().max() > 0


def test_context_parallel_slices_of_responses_are_whitened_by_the_statistics_of_all() -> None:
    """Each CP rank normalized its slice of the positions by its own mean and deviation."""
    g = torch.Generator().manual_seed(3)
    values = torch.randn(4, 10, generator=g, dtype=torch.float64) + torch.arange(10)  # later positions are larger
    mask = (torch.rand(4, 10, generator=g) < 0.7).float()
    expected = whiten(values, mask, global_moments(values, mask, one_rank))

    def work(rank: int, reduce_sum: ReduceSum) -> Tensor:
        columns = slice(5 * rank, 5 * rank + 5)
        part = values[:, columns], mask[:, columns]
        return whiten(*part, global_moments(*part, reduce_sum))

    found = torch.cat(Ranks(2).run(work), dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    alone = whiten(values[:, :5], mask[:, :5], global_moments(values[:, :5], mask[:, :5], one_rank))
    assert (alone - expected[:, :5]).abs().max() > 0.5, "the case must show the error"


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_ranks_with_different_dtypes_reduce_in_float64_alike(preset: str) -> None:
    """A rank that built its empty tensor as float32 met one with bfloat16 in the all-reduce: error, or garbage."""
    batches = [random_batch(seed) for seed in (1, 2, 3)]
    for batch, dtype in zip(batches, (torch.bfloat16, torch.float32, torch.float64), strict=True):
        for name in ("rewards", "kl", "loss_mask", "greedy_rewards"):
            batch[name] = batch[name].bfloat16().to(dtype)  # the same values as any of the three
    found, ranks = ranks_run(batches, preset)
    assert {dtype for calls in ranks.calls for _, dtype in calls} <= {torch.float64}
    wide = [{k: x.double() if x.is_floating_point() else x for k, x in batch.items()} for batch in batches]
    for one, other in zip(found, ranks_run(wide, preset)[0], strict=True):
        assert one.dtype == torch.float64 and torch.equal(one, other)


def single(kl: list[float], mask: list[int], **settings: Any) -> list[float]:
    """Un-normalized advantages of one response with R = 1, KL to go and beta = 0.1."""
    found = compute_advantages(
        torch.tensor([1.0], dtype=torch.float64),
        torch.tensor([kl], dtype=torch.float64),
        torch.tensor([mask]),
        torch.tensor([0]),
        estimator="remax",
        greedy_rewards=torch.tensor([0.0]),
        kl_coef=0.1,
        **settings,
    )
    return [round(x, 12) for x in found[0].tolist()]


def test_kl_of_observation_and_padding_tokens_is_not_in_the_returns() -> None:
    """mask 1 0 1 0: only kl 1 and 2 count, G = 1 - 0.3 and 1 - 0.2. The tool's output is not the policy's."""
    assert single([1.0, 50.0, 2.0, 70.0], [1, 0, 1, 0]) == [0.7, 0, 0.8, 0]


def test_returns_are_not_reset_at_observation_tokens() -> None:
    """With `running * mask` the first turn of a dialogue with tools got no reward at all."""
    assert single([0.0] * 5, [1, 1, 0, 0, 1]) == [1, 1, 0, 0, 1]
    assert single([0.0] * 5, [1, 1, 0, 0, 1], gamma_skips_masked=False) == [1, 1, 0, 0, 1]


@pytest.mark.parametrize("junk", [0.0, 1e3, float("nan")])
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_padding_enters_neither_mean_nor_variance(preset: str, junk: float) -> None:
    """A batch padded on both sides to three times its width has the same advantages."""
    batch = random_batch(4)
    padded = dict(batch)
    padded["loss_mask"] = torch.nn.functional.pad(batch["loss_mask"], (4, 8))
    padded["kl"] = torch.nn.functional.pad(batch["kl"], (4, 8), value=junk)
    found = compute_advantages(**padded, preset=preset, kl_coef=0.05)
    expected = compute_advantages(**batch, preset=preset, kl_coef=0.05)
    torch.testing.assert_close(found[:, 4:-8], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("preset", [name for name in PRESET_NAMES if name != "dr_grpo"])
def test_token_mean_does_not_count_padding(preset: str) -> None:
    """`loss.mean()` over the padded batch scales a step by its share of response tokens: long batches learn less."""
    case = random_loss_case(5)
    padded: Batch = {name: torch.nn.functional.pad(x, (4, 8)) for name, x in case.items()}
    found, expected = policy_loss(**padded, preset=preset).loss.item(), policy_loss(**case, preset=preset).loss.item()
    assert found == pytest.approx(expected, rel=1e-12) and abs(expected) > 1e-3


def test_token_mean_divides_by_the_masked_tokens() -> None:
    """Two of eight tokens, losses 3 and 1: 2. Divided by 8 it would be 0.5."""
    zeros = torch.zeros(2, 4, dtype=torch.float64)
    advantages, mask = zeros + 77, torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0]])
    advantages[0, 1], advantages[1, 2] = -3, -1
    assert policy_loss(zeros, zeros, advantages, mask).loss.item() == 2.0


@pytest.mark.parametrize("size", [2, 4, 16])
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_leave_one_out_is_not_divided_by_the_deviation_of_the_others(preset: str, size: int) -> None:
    """One wrong answer among right ones: the others' deviation is 0, and (0 - 1) / 1e-6 was -1e6.

    Ours is at most (n - 1) / sqrt(n) in size for grpo, sqrt(n - 1) for the globally normalized, 1 for the others.
    """
    rewards = torch.ones(size)
    rewards[0] = 0
    batch: Batch = {
        "rewards": rewards,
        "kl": torch.zeros(size, 1),
        "loss_mask": torch.ones(size, 1),
        "group_ids": torch.zeros(size, dtype=torch.int64),
        "greedy_rewards": torch.ones(size),
    }
    found = compute_advantages(**batch, preset=preset, kl_coef=0.0)[:, 0]
    assert found[0] < 0
    assert found.abs().max().item() <= max(size - 1, 1) ** 0.5 + 1e-12
