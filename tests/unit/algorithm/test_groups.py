"""Statistics of the responses to one prompt, on one rank and on several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_rpp.algorithm.groups import MAX_GROUPS, group_moments
from megatron_rpp.algorithm.masked import ReduceSum
from tests.unit.algorithm.cases import Ranks, one_rank


def test_each_row_gets_the_moments_of_its_group() -> None:
    """Groups 5: 1, 3, 8 (mean 4, squares 9 + 1 + 16) and 0: 7 alone, interleaved."""
    x = torch.tensor([1.0, 7.0, 3.0, 8.0])
    moments = group_moments(x, torch.tensor([5, 0, 5, 5]), one_rank)
    assert moments.count.tolist() == [3, 1, 3, 3]
    assert moments.mean.tolist() == [4, 7, 4, 4]
    assert moments.variance.tolist() == pytest.approx([26 / 3, 0, 26 / 3, 26 / 3], rel=1e-15)
    assert moments.deviation(x).tolist() == [-3, 0, -1, 4]
    assert moments.mean.dtype == torch.float64


def test_a_group_spans_ranks_and_a_rank_may_hold_none() -> None:
    """Group 1 is 1, 5 on rank 0 and 6 on rank 2: mean 4 on both; rank 1 has no rows."""
    values = [torch.tensor([1.0, 9.0, 5.0]), torch.zeros(0), torch.tensor([6.0])]
    ids = [torch.tensor([1, 3, 1]), torch.zeros(0, dtype=torch.int64), torch.tensor([1])]

    def work(rank: int, reduce_sum: ReduceSum) -> list[float]:
        found: list[float] = group_moments(values[rank], ids[rank], reduce_sum).mean.tolist()
        return found

    ranks = Ranks(3)
    assert ranks.run(work) == [[4, 9, 4], [], [4]]
    assert ranks.calls[0] == ranks.calls[1] == ranks.calls[2]


def test_equal_values_far_from_zero_have_no_variance_and_no_deviation() -> None:
    """Three times 0.7 + 1000: a mean that is off by one ulp would come out of grpo as 1e-13 / 1e-6."""
    x = torch.full((3,), 1000.7, dtype=torch.float64)
    moments = group_moments(x, torch.zeros(3, dtype=torch.int64), one_rank)
    assert moments.deviation(x).abs().max().item() < 1e-25
    assert moments.variance.max().item() < 1e-25


@pytest.mark.parametrize("highest", [0, 1, 2, 3, 4, MAX_GROUPS - 1])
def test_ids_up_to_the_limit_are_taken(highest: int) -> None:
    """The table is a power of two: ids next to one are where it would be too small."""
    moments = group_moments(torch.tensor([3.0, 5.0]), torch.tensor([highest, highest]), one_rank)
    assert moments.mean.tolist() == [4, 4]


@pytest.mark.parametrize("bad", [-1, -(2**63), MAX_GROUPS, 2**40, 2**63 - 1])
def test_an_id_out_of_range_is_refused_on_every_rank(bad: int) -> None:
    """Raised on its own rank alone, the others would wait in the next all-reduce for ever.

    Ranks 0 and 2 hold fine ids, or none; rank 1 also holds a fine one.
    """
    ids = [torch.tensor([0, 1]), torch.tensor([1, bad]), torch.zeros(0, dtype=torch.int64)]

    def work(rank: int, reduce_sum: ReduceSum) -> str:
        with pytest.raises(ValueError) as caught:
            group_moments(torch.ones(len(ids[rank])), ids[rank], reduce_sum)
        return str(caught.value)

    expected = "group_ids must be from 0 to 4194303; number the prompts of the batch from 0"
    assert Ranks(3).run(work) == [expected] * 3


def test_the_table_grows_with_the_ids_and_not_to_its_limit() -> None:
    """256 prompts reduce 2 x 256 numbers a pass, not 2 x 4 million."""
    shapes: list[tuple[int, ...]] = []

    def reduce_sum(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x

    group_moments(torch.ones(256), torch.arange(256), reduce_sum)
    assert shapes == [(65,), (2, 256), (2, 256)]
