"""Which mini-batch and which replica every response of a step is dealt to, without any collective."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from megatron_rpp.engine.balance import Deal, Size, deal_out
from megatron_rpp.experience.balance import SequenceCost

COST = SequenceCost(linear=1.0, quadratic=3e-5)


def sampled(prompts: int, samples: int, replicas: int, seed: int = 3) -> list[list[Size]]:
    """As the engine leaves them: prompt i on replica i mod `replicas`; a prompt's lengths do not depend on that."""
    chance = random.Random(seed)
    lengths = [[min(int(chance.lognormvariate(7.0, 1.0)), 8192) + 1 for _ in range(samples)] for _ in range(prompts)]
    return [
        [Size(group, tokens) for group in range(replica, prompts, replicas) for tokens in lengths[group]]
        for replica in range(replicas)
    ]


def content(deal: Deal, sizes: list[list[Size]]) -> list[Counter[Size]]:
    """What every mini-batch holds."""
    found = [Counter[Size]() for _ in range(max(deal.minibatch) + 1)]
    for (replica, row), of in zip(deal.source, deal.minibatch, strict=True):
        found[of][sizes[replica][row]] += 1
    return found


@pytest.mark.parametrize("may_move", [False, True])
@pytest.mark.parametrize("replicas", [2, 3, 6])
def test_a_mini_batch_holds_the_same_responses_at_any_data_parallel_size_packed_or_not(
    replicas: int, may_move: bool
) -> None:
    alone, split = sampled(12, 4, 1), sampled(12, 4, replicas)
    expected = content(deal_out(alone, 24, COST, may_move=False), alone)

    found = content(deal_out(split, 24, COST, may_move=may_move), split)

    assert found == expected
    assert [sum(each.values()) for each in found] == [24, 24]


def test_where_responses_stay_a_replica_trains_what_it_sampled_in_the_order_that_it_had() -> None:
    """As padded training has always done: mini-batch j takes rows j * batch_size / DP and following."""
    sizes = sampled(8, 2, 2)

    deal = deal_out(sizes, 8, COST, may_move=False)

    for replica in (0, 1):
        rows = [(row, of) for (source, row), of in zip(deal.source, deal.minibatch, strict=True) if source == replica]
        assert rows == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1), (7, 1)]
    assert deal.owner == [replica for replica, _ in deal.source]


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_moving_responses_brings_a_long_tail_within_five_percent(replicas: int) -> None:
    sizes = sampled(64, 4, replicas)

    stay, move = (deal_out(sizes, 128, COST, may_move=may_move) for may_move in (False, True))

    assert stay.imbalance > 0.05, "the sample must be one that needs balancing"
    assert move.imbalance < 0.05


def test_the_imbalance_is_the_mean_over_mini_batches() -> None:
    """Costs 3 and 1, then 2 and 2: 0.5 and 0."""
    sizes = [[Size(0, 3), Size(2, 2)], [Size(1, 1), Size(3, 2)]]
    assert deal_out(sizes, 2, float, may_move=False).imbalance == 0.25


def test_balanced_responses_do_not_move() -> None:
    sizes = [[Size(group, 100) for group in range(replica, 8, 2)] for replica in (0, 1)]
    deal = deal_out(sizes, 8, COST, may_move=True)
    assert deal.owner == [replica for replica, _ in deal.source]


def test_every_replica_has_work_in_every_mini_batch_that_has_enough_of_it() -> None:
    sizes = [[Size(0, 10_000)], [Size(1, 1)], [Size(2, 1), Size(3, 1)]]
    assert set(deal_out(sizes, 4, COST, may_move=True).owner) == {0, 1, 2}


@pytest.mark.parametrize(("responses", "expected"), [(3, {0: 3}), (7, {0: 7}), (9, {0: 5, 1: 4})])
def test_responses_that_batch_size_does_not_divide_fill_the_mini_batches_evenly(
    responses: int, expected: dict[int, int]
) -> None:
    """Dynamic sampling may leave fewer."""
    deal = deal_out([[Size(i, 5) for i in range(responses)]], 4, COST, may_move=True)
    assert Counter(deal.minibatch) == expected


def test_groups_that_the_replicas_hold_in_any_order_are_numbered_by_group() -> None:
    deal = deal_out([[Size(5, 9), Size(5, 8)], [Size(1, 7)]], 3, COST, may_move=False)
    assert deal.source == [(1, 0), (0, 0), (0, 1)]
