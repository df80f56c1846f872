"""Which servers are accused by what they say of tokens that were sampled before."""

from __future__ import annotations

import math

from megatron_rpp.parity.evidence import Rescored, wrong_servers

A, B = "http://a:1", "http://b:1"


def scored(mean: float, engine_mean: float, tokens: float = 40.0) -> Rescored:
    """Log-probs off by `mean` at temperature 1, of tokens whose recorded ones are off by `engine_mean`."""
    return Rescored(mean * tokens, engine_mean * tokens, tokens)


def test_a_server_is_measured_by_the_tokens_that_it_scored_and_not_by_worse_ones() -> None:
    # A difference that grows over 8,192 tokens to 1.2: 0.6 in the mean, and 0.075 over the first 1,024.
    assert wrong_servers({A: scored(0.075, 0.075, 1024.0)}, 1.0) == {A: 0.075}


def test_a_bad_server_that_was_given_milder_tokens_is_accused() -> None:
    found = wrong_servers({A: scored(0.6, 0.6), B: scored(0.1, 0.05)}, 1.0)
    assert set(found) == {A, B}


def test_a_good_server_that_was_given_its_own_tokens_is_not_accused_of_rounding() -> None:
    assert set(wrong_servers({A: scored(1e-6, 1e-6), B: scored(0.6, 0.6)}, 1.0)) == {B}
    assert set(wrong_servers({A: scored(0.02, 0.02), B: scored(0.6, 0.6)}, 1.0)) == {B}, "bfloat16"


def test_errors_at_temperature_one_are_compared_with_those_at_the_configured_one() -> None:
    # Logits that are off by 0.3 are 0.3 off at temperature 1, and 0.6 at one half.
    assert set(wrong_servers({A: scored(0.3, 0.6)}, 0.5)) == {A}
    assert wrong_servers({A: scored(0.14, 0.6)}, 0.5) == {}


def test_log_probs_that_are_no_numbers_accuse_their_server_alone() -> None:
    assert set(wrong_servers({A: scored(math.nan, 0.6), B: scored(0.001, 0.6)}, 1.0)) == {A}


def test_servers_that_agree_now_and_no_servers_accuse_nobody() -> None:
    assert wrong_servers({A: scored(0.0, 0.6)}, 1.0) == {}
    assert wrong_servers({}, 1.0) == {}
