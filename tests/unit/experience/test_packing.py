"""Which rows share a microbatch, and what stands where once they are packed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.experience import packing
from megatron_rpp.experience.balance import SequenceCost, partition
from megatron_rpp.experience.packing import PackingRule, cut, lengths_of, pack, packed_length, padded, zigzag
from megatron_rpp.experience.types import ExperienceBatch

COST = SequenceCost(linear=1.0, quadratic=0.1)
LENGTHS = st.lists(st.integers(0, 40), min_size=0, max_size=12)
RULES = st.builds(
    lambda cp_size, unit, budget: PackingRule(budget, cp_size, unit=unit),
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 60),
)  # fmt: skip


def make_batch(lengths: list[int]) -> ExperienceBatch:
    """Row i has 10 i + 1, 10 i + 2, ...; its first token is the prompt's, unless it has none at all."""
    width = max([*lengths, 1]) + 2
    columns = torch.arange(width)
    mask = (columns < torch.tensor(lengths, dtype=torch.int64)[:, None]) & (columns > 0)
    tokens = torch.arange(len(lengths))[:, None] * 10 + columns + 1
    numbers = torch.arange(len(lengths))
    return ExperienceBatch(tokens, mask.float(), mask.float() * tokens, numbers.double(), numbers)


def test_the_worked_example() -> None:
    """Sequences of 3 and 5 tokens on two CP ranks: slots of 4 and 8 with chunks of 1 and 2."""
    batch = make_batch([3, 9, 5])
    first, second = (pack(batch, [0, 2], PackingRule(64, 2, rank)) for rank in range(2))
    assert first.cu_seqlens is not None and first.cu_seqlens.tolist() == [0, 4, 12]
    assert first.cu_seqlens.dtype == torch.int32
    assert first.tokens.tolist() == [[1, 0, 21, 22, 0, 0]]  # chunks 0 and 3 of each
    assert second.tokens.tolist() == [[2, 3, 23, 24, 25, 0]]  # 1 and 2
    assert first.logits_at[:, :5].tolist() == [[0, -1, -1, -1, -1], [2, 3, -1, -1, -1]]
    assert second.logits_at[:, :5].tolist() == [[-1, 0, 1, -1, -1], [-1, -1, 2, 3, 4]]
    assert (first.positions, first.real_positions, first.width) == (12, 8, 1)
    assert first.index.tolist() == [0, 2] and first.rows.group_ids.tolist() == [0, 2]


def test_one_rank_packs_without_a_hole() -> None:
    micro = pack(make_batch([3, 2]), [1, 0], PackingRule(64))
    assert micro.tokens.tolist() == [[11, 12, 1, 2, 3]]
    assert micro.cu_seqlens is not None and micro.cu_seqlens.tolist() == [0, 2, 5]
    assert micro.positions == micro.real_positions == 5


@given(lengths=LENGTHS.map(lambda ns: [n for n in ns if n > 1]), rule=RULES, least=st.integers(0, 99))
def test_every_token_is_on_one_rank_at_the_place_that_its_slot_and_the_ranks_chunks_say(
    lengths: list[int], rule: PackingRule, least: int
) -> None:
    batch, index = make_batch(lengths), list(range(len(lengths)))[::-1]
    ranks = [
        pack(batch, index, PackingRule(rule.budget, rule.cp_size, r, rule.unit), least) for r in range(rule.cp_size)
    ]
    total = ranks[0].positions
    assert total >= max(least, packed_length(lengths, rule)) and total % (rule.cp_size * rule.unit) == 0
    assert ranks[0].cu_seqlens is not None
    bounds = ranks[0].cu_seqlens.tolist()
    assert ranks[0].bounds == tuple(bounds)
    assert bounds[0] == 0 and bounds[-1] == total
    assert all(end > start and (end - start) % rule.slot_multiple == 0 for start, end in pairwise(bounds))
    places = torch.stack([micro.logits_at for micro in ranks])
    real = torch.arange(batch.tokens.shape[1]) < torch.tensor([lengths[i] for i in index] or [0])[:, None]
    assert torch.equal((places >= 0).sum(0), real.long()), "a token is on one rank, padding on none"
    packed = torch.cat([micro.tokens[0] for micro in ranks])[zigzag(bounds, rule.cp_size).flatten().argsort()]
    for row, start in zip(index, bounds, strict=False):
        assert packed[start : start + lengths[row]].tolist() == batch.tokens[row, : lengths[row]].tolist()
    for micro in ranks:
        assert micro.tokens.shape == (1, total // rule.cp_size)
        for row, column in (micro.logits_at >= 0).nonzero().tolist():
            assert micro.tokens[0, micro.logits_at[row, column]] == micro.rows.tokens[row, column]


@given(lengths=LENGTHS, rule=RULES, multiple=st.integers(1, 3), of_one_length=st.booleans())
def test_a_cut_has_each_row_with_tokens_once_and_keeps_the_budget(
    lengths: list[int], rule: PackingRule, multiple: int, of_one_length: bool
) -> None:
    parts = cut(lengths, rule, COST, count_multiple=multiple, of_one_length=of_one_length)
    assert sorted(i for part in parts for i in part) == [i for i, length in enumerate(lengths) if length]
    assert parts and len(parts) % multiple == 0
    for part in parts:
        tokens = sum(-(-lengths[i] // rule.slot_multiple) * rule.slot_multiple for i in part)
        assert tokens <= rule.budget or len(part) == 1


def test_a_cut_is_no_finer_than_the_budget_asks_and_balanced_by_cost() -> None:
    rule = PackingRule(30)
    assert len(cut([30, 4, 4, 4, 4, 4, 4, 6], rule, COST, of_one_length=False)) == 2
    assert all(len({i // 2 for i in part}) == 2 for part in cut([20, 20, 2, 2], rule, COST, of_one_length=False))


@pytest.mark.parametrize(("least", "most_microbatches"), [(0.55, 512), (0.35, 400), (0.3, 512 // 2)])
def test_many_rows_of_which_few_share_a_microbatch_are_cut_after_a_few_tries(
    monkeypatch: pytest.MonkeyPatch, least: float, most_microbatches: int
) -> None:
    """By tokens 400 microbatches would hold the first 512, whose every pair is above the budget."""
    counts: list[int] = []

    def counted(costs: Sequence[float], count: int) -> list[list[int]]:
        counts.append(count)
        return partition(costs, count)

    monkeypatch.setattr(packing, "partition", counted)
    chance, budget = random.Random(0), 32_768
    top = 1.0 if least > 0.3 else 0.4
    lengths = [int(budget * chance.uniform(least, top)) for _ in range(512)]
    parts = cut(lengths, PackingRule(budget), COST, of_one_length=False)
    assert len(parts) <= most_microbatches and max(sum(lengths[i] for i in part) for part in parts) <= budget
    assert sorted(i for part in parts for i in part) == list(range(512))
    assert len(counts) <= (1 if least == 0.55 else 2 * 9), counts


def test_where_no_balanced_cut_keeps_the_budget_first_fit_does() -> None:
    """Two microbatches hold them only as 6 + 4 and 5 + 3 + 2; largest differencing makes 6 + 2 + 3 and 5 + 4."""
    lengths = [6, 5, 4, 3, 2]
    assert cut(lengths, PackingRule(10), COST, of_one_length=True) == [[0, 2], [1, 3, 4]]
    assert len(cut(lengths, PackingRule(10), COST, count_multiple=4, of_one_length=True)) == 4


def test_microbatches_of_one_length_are_balanced_by_tokens() -> None:
    """By cost the long sequence would be alone, and all microbatches padded to the four others."""
    lengths, rule = [12, 8, 8, 8, 8], PackingRule(32)
    cost = SequenceCost(linear=1.0, quadratic=10.0)

    def longest(of_one_length: bool) -> int:
        return max(sum(lengths[i] for i in part) for part in cut(lengths, rule, cost, of_one_length=of_one_length))

    assert longest(False) == 24 and longest(True) == 24
    uneven = [20, 7, 7, 7, 7]
    by_cost, by_tokens = (
        [
            sorted(uneven[i] for i in part)
            for part in cut(uneven, PackingRule(64), cost, count_multiple=2, of_one_length=one)
        ]
        for one in (False, True)
    )
    assert sorted(by_cost) == [[7, 7, 7, 7], [20]] and sorted(by_tokens) == [[7, 7, 7], [7, 20]]


def test_a_microbatch_without_rows_has_one_that_trains_nothing() -> None:
    """The pipeline wants as many as it was told, and a backward through each."""
    for batch in (make_batch([3]), make_batch([])):
        micro = pack(batch, [], PackingRule(8, 2, 1, unit=4), least_tokens=9)
        assert micro.index.tolist() == [] and len(micro.rows) == 1 and micro.rows.loss_mask.sum() == 0
        assert micro.positions == 16 and micro.tokens.shape == (1, 8)
        assert micro.cu_seqlens is not None and micro.cu_seqlens.tolist() == [0, 16]
        assert (micro.logits_at == -1).all() and micro.real_positions == 0


def test_a_length_ends_with_the_last_response_token_and_is_none_without_one() -> None:
    mask = torch.tensor([[0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]).float()
    assert lengths_of(mask).tolist() == [5, 0, 6]


def test_padded_rows_have_their_logits_in_reading_order() -> None:
    micro = padded(make_batch([2, 1]))
    assert micro.logits_at.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert micro.cu_seqlens is None and (micro.positions, micro.width) == (8, 2)


@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_zigzag_gives_every_rank_the_same_attention_work(cp_size: int) -> None:
    """A contiguous split would give the last rank nearly twice the mean."""
    bounds = [0, 4 * cp_size, 10 * cp_size]
    position = torch.cat([torch.arange(end - start) for start, end in pairwise(bounds)])
    work = [int((position[own] + 1).sum()) for own in zigzag(bounds, cp_size)]
    assert len(set(work)) == 1
