"""However a batch is spread over ranks, every preset gives the advantages of one process."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rpp.algorithm import compute_advantages
from megatron_rpp.algorithm.masked import ReduceSum
from megatron_rpp.config.presets import algorithm_config
from tests.unit.algorithm.cases import PRESET_NAMES, Batch, Ranks, random_batch

COLLECTIVES = {"group": 3, "whiten": 2}  # ids, then two passes; two passes


def cut(batch: Batch, edges: list[int]) -> list[Batch]:
    return [{name: x[a:b] for name, x in batch.items()} for a, b in pairwise(edges)]


def spread(parts: list[Batch], preset: str, **overrides: Any) -> tuple[Tensor, Ranks]:
    """Advantages of all ranks joined, and what they called."""

    def work(rank: int, reduce_sum: ReduceSum) -> Tensor:
        return compute_advantages(**parts[rank], preset=preset, reduce_sum=reduce_sum, **overrides)

    ranks = Ranks(len(parts))
    return torch.cat(ranks.run(work)), ranks


def assert_same_calls(ranks: Ranks) -> None:
    """A rank that skipped one, or joined with another shape or dtype, would hang or corrupt the others."""
    assert ranks.calls == [ranks.calls[0]] * len(ranks.calls)
    assert {dtype for _, dtype in ranks.calls[0]} <= {torch.float64}


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    cuts=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    offset=st.sampled_from([0.0, 1e3]),
    sd=st.sampled_from([1.0, 1e-3]),
    gamma=st.sampled_from([1.0, 0.9]),
)
@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_any_split_over_ranks_gives_the_advantages_of_one_rank(
    preset: str, seed: int, cuts: list[int], offset: float, sd: float, gamma: float
) -> None:
    """Groups cut across ranks, ranks without rows or response tokens, deviations of 1e-3 at a mean of 1000."""
    batch = random_batch(seed)
    for name in ("rewards", "greedy_rewards"):
        batch[name] = offset + sd * batch[name]
    batch["kl"] = sd * batch["kl"]
    overrides: dict[str, Any] = {"kl_coef": 0.05, "gamma": gamma, "reward_clip": 0.0 if offset else 10.0}
    whole = compute_advantages(**batch, preset=preset, **overrides)
    found, ranks = spread(cut(batch, [0, *sorted(cuts), 9]), preset, **overrides)
    largest = max(whole.abs().max().item(), 1e-3)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-12 * largest)
    assert_same_calls(ranks)


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_every_rank_makes_the_same_collectives_whatever_it_holds(preset: str) -> None:
    """Ranks with rows, without rows, without tokens, with only group 0 and with the highest group."""
    batch = random_batch(3, rows=8)
    batch["loss_mask"][:] = 1
    batch["loss_mask"][2:4] = 0
    batch["group_ids"] = torch.tensor([5, 1, 2, 2, 0, 0, 900, 5])
    _, ranks = spread(cut(batch, [0, 2, 2, 4, 6, 8]), preset, kl_coef=0.05)
    assert_same_calls(ranks)
    estimator = algorithm_config(preset).estimator
    expected = COLLECTIVES["group"] * (estimator not in ("reinforce_pp", "remax"))
    expected += COLLECTIVES["whiten"] * estimator.startswith("reinforce_pp")
    assert len(ranks.calls[0]) == expected


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_one_rank_holding_everything_equals_one_row_a_rank(preset: str) -> None:
    """The most uneven splits: all rows on one of nine ranks, and one on each."""
    batch = random_batch(8)
    everything, ranks = spread(cut(batch, [0, 0, 0, 0, 9, 9, 9, 9, 9, 9]), preset, kl_coef=0.05)
    assert_same_calls(ranks)
    one_each, _ = spread(cut(batch, list(range(10))), preset, kl_coef=0.05)
    largest = everything.abs().max().item()
    assert largest > 1e-3
    torch.testing.assert_close(one_each, everything, rtol=0, atol=1e-12 * largest)


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_ranks_without_any_token_anywhere_agree_on_zeros(preset: str) -> None:
    batch = random_batch(2)
    batch["loss_mask"][:] = 0
    found, ranks = spread(cut(batch, [0, 4, 4, 9]), preset, kl_coef=0.05)
    assert (found == 0).all()
    assert_same_calls(ranks)


def test_the_advantages_of_ranks_alone_differ() -> None:
    """Else these cases could not tell a normalization over ranks from one on each."""
    batch = random_batch(8)
    for preset in ("paper", "grpo"):
        alone = [compute_advantages(**part, preset=preset) for part in cut(batch, [0, 4, 9])]
        assert (torch.cat(alone) - compute_advantages(**batch, preset=preset)).abs().max().item() > 0.1
