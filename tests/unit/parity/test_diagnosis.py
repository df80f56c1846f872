"""Evidence to cause: each fault has its own name, and what was proved stands before what was inferred."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_rpp.parity.diagnosis import diagnose
from megatron_rpp.parity.evidence import ContextCheck, Evidence, Rescored, TemperatureFit, merged_checks

A, B = "http://a:1", "http://b:1"
NO_FIT = TemperatureFit(configured=1.0, error=0.6, best=1.2, best_error=0.5)
FIT = TemperatureFit(configured=1.0, error=0.6, best=0.7, best_error=0.001)
AGREE, DISAGREE = Rescored(d=0.04, tokens=40.0), Rescored(d=20.0, tokens=40.0)
WRONG_PROMPTS = ContextCheck(known=64, different=12, example="prompt 3 has 12 tokens here and 14 there")


def evidence(**changes: Any) -> Evidence:
    """A mean difference of 0.6 nats for which nothing is found."""
    healthy = Evidence(
        mean=0.6,
        correlation=0.0,
        slope=0.0,
        stale=(),
        context=ContextCheck(known=64),
        fit=NO_FIT,
        servers={A: AGREE, B: AGREE},
    )
    return replace(healthy, **changes)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"stale": (f"{A}: lm_head.weight",)}, "weights"),
        ({"context": WRONG_PROMPTS}, "tokenization"),
        ({"fit": FIT}, "sampling"),
        ({"servers": {A: AGREE, B: DISAGREE}}, "numerics"),
        ({"context": ContextCheck(unknown=64)}, "tokenization"),
        ({"mean": 1e-6, "bias": 0.4}, "sampling"),
        ({"servers": {}}, "unknown"),
        ({"servers": {A: DISAGREE}, "stale": None}, "unknown"),
        ({}, "numerics"),
    ],
)
def test_each_fault_has_its_name(changes: dict[str, Any], kind: str) -> None:
    assert diagnose(evidence(**changes)).kind == kind


def test_stale_weights_are_named_although_they_upset_all_else_too() -> None:
    lines = tuple(f"http://s:{i}: lm_head.weight" for i in range(7))
    found = diagnose(evidence(stale=lines, fit=FIT, context=WRONG_PROMPTS, servers={A: DISAGREE}))
    assert found.kind == "weights"
    assert "7 servers" in found.words and lines[4] in found.words and "and 2 more" in found.words
    assert lines[5] not in found.words


def test_numerics_are_not_accused_where_the_weights_were_not_compared() -> None:
    words = diagnose(evidence(servers={A: DISAGREE}, stale=None)).words
    assert "equal weights" not in words and "Other weights or other numerics" in words


def test_other_prompt_ids_come_before_a_temperature_that_happens_to_fit() -> None:
    assert diagnose(evidence(fit=FIT, context=WRONG_PROMPTS)).kind == "tokenization"


def test_the_server_that_computes_otherwise_is_named_and_the_others_are_not() -> None:
    words = diagnose(evidence(servers={A: AGREE, B: DISAGREE})).words
    assert B in words and A not in words and "1 of 2 servers" in words


def test_a_difference_that_grows_with_the_position_points_to_rope() -> None:
    grows = diagnose(evidence(servers={A: DISAGREE}, correlation=0.6, slope=0.31)).words
    assert "rope" in grows and "0.31 in 100 tokens" in grows
    assert "rope" not in diagnose(evidence(servers={A: DISAGREE})).words
    assert "one as large cannot" in diagnose(evidence(servers={A: DISAGREE}, mean=0.6)).words
    assert "one as large cannot" not in diagnose(evidence(servers={A: DISAGREE}, mean=0.1)).words


def test_the_fitted_temperature_is_told() -> None:
    words = diagnose(evidence(fit=FIT)).words
    assert "temperature 0.7" in words and "rollout.temperature=1" in words


def test_log_probs_of_temperature_one_point_to_the_servers_environment() -> None:
    at_one = TemperatureFit(configured=0.6, error=0.4, best=1.0, best_error=0.001)
    assert "SGLANG_RETURN_ORIGINAL_LOGPROB" in diagnose(evidence(fit=at_one)).words


def test_a_temperature_that_takes_away_less_than_half_accuses_nobody() -> None:
    assert not TemperatureFit(1.0, error=0.6, best=1.5, best_error=0.31).explains
    assert not TemperatureFit(1.0, error=0.6, best=1.01, best_error=0.01).explains, "that is no other temperature"


def test_errors_at_temperature_one_are_compared_with_those_at_the_configured_one() -> None:
    # Logits that are off by 0.3 are 0.3 off at temperature 1, and 0.6 at one half.
    cold = TemperatureFit(configured=0.5, error=0.6, best=0.5, best_error=0.6)
    assert diagnose(evidence(fit=cold, servers={A: Rescored(d=12.0, tokens=40.0)})).kind == "numerics"
    assert "compute other log-probs" in diagnose(evidence(fit=cold, servers={A: Rescored(12.0, 40.0)})).words


def test_right_log_probs_of_tokens_drawn_otherwise_are_sampling_although_rounding_differs() -> None:
    rounding = TemperatureFit(1.0, error=1e-6, best=1.0, best_error=1e-6)
    found = diagnose(evidence(mean=1e-6, bias=0.4, fit=rounding, servers={A: Rescored(d=4e-5, tokens=40.0)}))
    assert found.kind == "sampling" and "differs from the entropy by 0.4" in found.words


def test_a_bias_that_other_numerics_bring_along_is_not_called_sampling() -> None:
    assert diagnose(evidence(mean=0.3, bias=0.4, servers={A: DISAGREE})).kind == "numerics"


def test_top_p_is_not_blamed_for_more_than_it_can_do() -> None:
    # The nucleus of 0.9 holds at least 0.9 of the mass: log-probs grow by -log(0.9) = 0.105 at most.
    small = diagnose(evidence(top_p=0.9, mean=0.1))
    assert small.kind == "sampling" and "by design" in small.words
    assert diagnose(evidence(top_p=0.9, mean=0.2)).kind == "numerics"


def test_what_could_not_be_found_out_is_told() -> None:
    assert diagnose(evidence(notes=("not scored again: HTTP 503",))).words.endswith("(not scored again: HTTP 503)")


def test_ids_that_are_not_those_of_the_text_are_told_apart_from_an_engine_that_got_others() -> None:
    ours = replace(WRONG_PROMPTS, retokenized=8, retokenized_otherwise=8)
    assert "not those of the prompt's text for 8 of 8" in diagnose(evidence(context=ours)).words
    theirs = replace(WRONG_PROMPTS, retokenized=8)
    assert "are those of the prompts' text" in diagnose(evidence(context=theirs)).words


def test_checks_of_replicas_add_up_with_the_first_example() -> None:
    total = merged_checks([ContextCheck(known=2), WRONG_PROMPTS, replace(WRONG_PROMPTS, example="other")])
    assert (total.known, total.different, total.example) == (130, 24, WRONG_PROMPTS.example)
