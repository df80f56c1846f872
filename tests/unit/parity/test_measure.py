"""The sums of a mismatch, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rpp.parity.measure import Mismatch, measure, merged, worst_rows

NAN = math.nan
#                      prompt | response      | padding
MASK = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
TRAINER = torch.tensor([[NAN, -1.0, -2.0, NAN], [NAN, NAN, -1.5, -0.5]])
ENGINE = torch.tensor([[NAN, -1.5, -2.0, NAN], [NAN, NAN, -1.0, -1.5]])
# d at (position): 0.5 (1), 0 (2), 0.5 (2), 1 (3)


def test_mean_and_maximum_are_over_response_tokens_alone() -> None:
    found = measure(TRAINER, ENGINE, MASK)
    assert (found.tokens, found.mean, found.largest) == (4, 0.5, 1.0)


def test_kl_is_the_k3_estimate_of_engine_against_trainer() -> None:
    ratios = [math.exp(0.5), 1.0, math.exp(-0.5), math.e]  # trainer / engine
    expected = sum(r - 1 - math.log(r) for r in ratios) / 4
    assert measure(TRAINER, ENGINE, MASK).metrics()["mismatch/kl"] == pytest.approx(expected)


def test_surprise_is_zero_for_an_engine_as_random_as_the_trainer_and_negative_for_a_greedier_one() -> None:
    entropy = torch.full_like(MASK, 1.5)  # -log-probs of the engine: 1.5, 2, 1, 1.5; their mean is 1.5
    assert measure(TRAINER, ENGINE, MASK, entropy).metrics()["mismatch/surprise"] == pytest.approx(0.0)
    greedier = measure(TRAINER, ENGINE / 2, MASK, entropy).metrics()["mismatch/surprise"]
    assert greedier == pytest.approx(-0.75)


def test_a_bias_is_one_only_where_it_is_six_deviations_from_zero() -> None:
    # 100 values of s with squares that add up to 100: their sum has a standard deviation of 10.
    assert Mismatch(tokens=100.0, surprise=-61.0, surprise_squares=100.0).bias() == pytest.approx(0.61)
    assert Mismatch(tokens=100.0, surprise=59.0, surprise_squares=100.0).bias() == 0.0
    assert Mismatch().bias() == 0.0


def test_squares_of_the_surprise_are_those_of_its_tokens() -> None:
    entropy = torch.full_like(MASK, 1.0)  # s: 0.5, 1, 0, 0.5
    assert measure(TRAINER, ENGINE, MASK, entropy).surprise_squares == pytest.approx(1.5)


def test_growth_is_the_least_squares_line_through_position_and_difference() -> None:
    # x = 1 2 2 3 with mean 2, d = .5 0 .5 1 with mean .5: sums of products .5, of squares 2 and .5
    correlation, slope = measure(TRAINER, ENGINE, MASK).growth()
    assert correlation == pytest.approx(0.5 / math.sqrt(2 * 0.5))
    assert slope == pytest.approx(100 * 0.25)


def test_a_constant_difference_does_not_grow() -> None:
    assert measure(ENGINE - 0.25, ENGINE, MASK).growth() == (0.0, 0.0)


def test_replicas_add_up_to_the_whole_batch() -> None:
    parts = [measure(TRAINER[i : i + 1], ENGINE[i : i + 1], MASK[i : i + 1]) for i in range(2)]
    assert merged(parts) == measure(TRAINER, ENGINE, MASK)
    assert merged([]) == Mismatch() and Mismatch().metrics() == {}


def test_a_replica_without_rows_adds_nothing() -> None:
    none = torch.zeros(0, 3)
    assert measure(none, none, none, none) == Mismatch()


def test_worst_rows_are_those_with_the_largest_token_mean_and_not_the_longest() -> None:
    trainer = torch.tensor([[0.0, 0.4, 0.4, 0.4], [0.0, 1.0, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0]])
    mask = torch.tensor([[0.0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]])
    assert worst_rows(trainer, torch.zeros(3, 4), mask, 2) == [1, 0]


def test_a_replica_without_rows_has_no_worst_one() -> None:
    none = torch.zeros(0, 1)
    assert worst_rows(none, none, none, 4) == []


def test_a_row_that_is_not_a_number_is_among_the_worst() -> None:
    trainer = torch.tensor([[0.0, 9.0], [0.0, NAN]])
    assert worst_rows(trainer, torch.zeros(2, 2), torch.tensor([[0.0, 1.0], [0.0, 1.0]]), 1) == [1]
