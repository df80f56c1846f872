import random

import pytest

from megatron_rpp.experience.balance import SequenceCost, first_fit, imbalance, partition


def _sums(costs, parts):
    return [sum(costs[i] for i in part) for part in parts]


def test_a_textbook_example_is_split_as_by_hand():
    """8, 7, 6, 5, 4: Karmarkar and Karp's two sums are 16 and 14."""
    costs = [8.0, 7.0, 6.0, 5.0, 4.0]

    assert sorted(_sums(costs, partition(costs, 2))) == [14.0, 16.0]


@pytest.mark.parametrize("seed", range(20))
def test_every_index_is_in_one_part_and_sums_differ_by_no_more_than_one_cost(seed):
    chance = random.Random(seed)
    costs = [chance.lognormvariate(0.0, 1.5) for _ in range(chance.randrange(1, 200))]
    count = chance.randrange(1, 12)

    parts = partition(costs, count)

    assert len(parts) == count
    assert sorted(i for part in parts for i in part) == list(range(len(costs)))
    assert all(part == sorted(part) for part in parts)
    sums = _sums(costs, parts)
    assert max(sums) - min(sums) <= max(costs) * (1 + 1e-9)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_long_tail_is_balanced_to_a_few_percent(count):
    """128 responses a step, a few of them of 32k tokens, by a cost with a large quadratic term."""
    cost = SequenceCost(linear=1.0, quadratic=1.0 / 16_384)
    chance = random.Random(7)
    costs = [cost(min(int(chance.lognormvariate(8.0, 1.0)), 32_768)) for _ in range(128)]

    sums = _sums(costs, partition(costs, count))

    assert imbalance(sums) < 0.01
    in_turn = [sum(costs[i::count]) for i in range(count)]
    assert imbalance(in_turn) > 0.05, "the sample must be one that needs balancing"


def test_equal_costs_give_equal_numbers():
    assert sorted(len(part) for part in partition([1.0] * 12, 4)) == [3, 3, 3, 3]


def test_more_parts_than_costs_leave_parts_empty():
    assert sorted(partition([2.0, 1.0], 4)) == [[], [], [0], [1]]
    assert partition([], 3) == [[], [], []]


def test_costs_of_zero_are_dealt_out_too():
    assert sorted(i for part in partition([0.0] * 5, 2) for i in part) == [0, 1, 2, 3, 4]


def test_a_window_makes_a_long_sequence_grow_linearly():
    full, sliding = SequenceCost(0.0, 1.0), SequenceCost(0.0, 0.0, sliding=1.0, window=4)

    assert sliding(3) == full(3) == 9.0
    assert sliding(4) == full(4) == 16.0
    assert [sliding(6) - sliding(5), sliding(10) - sliding(9)] == [8.0, 8.0]  # 2 x window a token


def test_imbalance_is_what_the_average_one_waits():
    assert imbalance([3.0, 1.0]) == 0.5
    assert imbalance([0.0, 0.0]) == 0.0


def test_first_fit_fills_the_first_part_that_has_room_and_leaves_what_is_too_large_alone():
    assert first_fit([2, 7, 5, 3, 12], 10) == [[4], [1, 3], [0, 2]]
    assert first_fit([], 10) == []
