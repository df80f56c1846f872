"""Evidence to cause: each fault has its own name, and what was proved stands before what was inferred."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_rpp.parity.diagnosis import diagnose
from megatron_rpp.parity.evidence import Evidence, PromptIdsCheck, Rescored, TemperatureFit, merged_checks
from megatron_rpp.parity.measure import Mismatch

A, B = "http://a:1", "http://b:1"
NO_FIT = TemperatureFit(configured=1.0, error=0.6, best=1.2, best_error=0.5)
FIT = TemperatureFit(configured=1.0, error=0.6, best=0.7, best_error=0.001)
AGREE, DISAGREE = Rescored(0.04, 24.0, 40.0), Rescored(20.0, 24.0, 40.0)
N = 10_000.0
WRONG_PROMPTS = PromptIdsCheck(known=64, different=12, example="prompt 3 has 12 tokens here and 14 there")


def mismatch(mean: float = 0.6, *, bias: float = 0.0, correlation: float = 0.0, slope: float = 0.0) -> Mismatch:
    """N tokens with such a mean difference; their positions have mean 0 and variance 1."""
    together = slope / 100
    variance = (together / correlation) ** 2 if correlation else 0.0
    return Mismatch(
        tokens=N,
        d=N * mean,
        surprise=-N * bias,
        surprise_squares=N,
        xx=N,
        xd=N * together,
        dd=N * (mean**2 + variance),
    )


def evidence(**changes: Any) -> Evidence:
    """A mean difference of 0.6 nats for which nothing is found."""
    healthy = Evidence(
        mismatch=mismatch(),
        stale=(),
        prompt_ids=PromptIdsCheck(known=64),
        fit=NO_FIT,
        servers={A: AGREE, B: AGREE},
    )
    return replace(healthy, **changes)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"stale": (f"{A}: lm_head.weight",)}, "weights"),
        ({"prompt_ids": WRONG_PROMPTS}, "tokenization"),
        ({"fit": FIT}, "sampling"),
        ({"servers": {A: AGREE, B: DISAGREE}}, "numerics"),
        ({"prompt_ids": PromptIdsCheck(unknown=64)}, "tokenization"),
        ({"mismatch": mismatch(1e-6, bias=0.4)}, "sampling"),
        ({"mismatch": mismatch(1e-6, bias=0.4), "top_p": 0.9}, "numerics"),
        ({"servers": {}}, "unknown"),
        ({"servers": {A: DISAGREE}, "stale": None}, "unknown"),
        ({}, "numerics"),
    ],
)
def test_each_fault_has_its_name(changes: dict[str, Any], kind: str) -> None:
    assert diagnose(evidence(**changes)).kind == kind


def test_stale_weights_are_named_although_they_upset_all_else_too() -> None:
    lines = tuple(f"http://s:{i}: lm_head.weight" for i in range(7))
    found = diagnose(evidence(stale=lines, fit=FIT, prompt_ids=WRONG_PROMPTS, servers={A: DISAGREE}))
    assert found.kind == "weights"
    assert "7 servers" in found.words and lines[4] in found.words and "and 2 more" in found.words
    assert lines[5] not in found.words


def test_numerics_are_not_accused_where_the_weights_were_not_compared() -> None:
    words = diagnose(evidence(servers={A: DISAGREE}, stale=None)).words
    assert "equal weights" not in words and "Other weights or other numerics" in words


def test_other_prompt_ids_come_before_a_temperature_that_happens_to_fit() -> None:
    assert diagnose(evidence(fit=FIT, prompt_ids=WRONG_PROMPTS)).kind == "tokenization"


def test_the_server_that_computes_otherwise_is_named_and_the_others_are_not() -> None:
    words = diagnose(evidence(servers={A: AGREE, B: DISAGREE})).words
    assert B in words and A not in words and "1 of 2 servers" in words


def test_a_difference_that_grows_with_the_position_points_to_rope() -> None:
    grows = diagnose(evidence(servers={A: DISAGREE}, mismatch=mismatch(correlation=0.6, slope=0.31))).words
    assert "suspect rope" in grows and "0.31 in 100 tokens (correlation 0.60)" in grows


def test_a_difference_that_stays_as_it_is_clears_rope_only_where_it_is_small() -> None:
    small = diagnose(evidence(servers={A: DISAGREE}, mismatch=mismatch(0.1))).words
    assert "does not grow" in small and "rope" not in small
    large = diagnose(evidence(servers={A: DISAGREE}, mismatch=mismatch(0.6))).words
    assert "does not grow" in large and "clears no rope setting" in large


def test_the_fitted_temperature_is_told() -> None:
    words = diagnose(evidence(fit=FIT)).words
    assert "temperature 0.7" in words and "rollout.temperature=1" in words


def test_log_probs_of_temperature_one_point_to_the_servers_environment() -> None:
    at_one = TemperatureFit(configured=0.6, error=0.4, best=1.0, best_error=0.001)
    assert "SGLANG_RETURN_ORIGINAL_LOGPROB" in diagnose(evidence(fit=at_one)).words


def test_a_temperature_that_takes_away_less_than_half_accuses_nobody() -> None:
    assert not TemperatureFit(1.0, error=0.6, best=1.5, best_error=0.31).explains
    assert not TemperatureFit(1.0, error=0.6, best=1.01, best_error=0.01).explains, "that is no other temperature"


def test_a_difference_that_grows_beyond_what_a_server_scores_is_not_put_on_decoding_kernels() -> None:
    # 0.6 over whole responses, 0.075 over their first 1,024 tokens, there and then and now.
    server = Rescored(abs_sum=76.8, engine_abs_sum=76.8, tokens=1024.0)
    one_unknown = PromptIdsCheck(known=63, unknown=1)
    found = diagnose(evidence(servers={A: server}, prompt_ids=one_unknown))
    assert found.kind == "numerics" and A in found.words and "compute other log-probs" in found.words


def test_a_temperature_that_fits_is_not_believed_over_a_server_that_is_wrong_at_temperature_one() -> None:
    lost_scale = diagnose(evidence(fit=FIT, servers={A: DISAGREE}))
    assert lost_scale.kind == "numerics" and "temperature" not in lost_scale.words
    assert diagnose(evidence(fit=FIT, servers={A: AGREE})).kind == "sampling"


def test_a_temperature_is_found_although_it_shifts_the_surprisal_as_well() -> None:
    assert "temperature 0.7" in diagnose(evidence(fit=FIT, mismatch=mismatch(0.1, bias=0.4))).words


def test_one_response_of_an_unknown_prompt_among_known_ones_is_no_sign_of_another_prompt() -> None:
    found = diagnose(evidence(prompt_ids=PromptIdsCheck(known=63, unknown=1)))
    assert found.kind == "numerics" and "decoding kernels" in found.words
    assert "most likely" in diagnose(evidence(prompt_ids=PromptIdsCheck(unknown=64))).words


def test_right_log_probs_of_tokens_drawn_otherwise_are_sampling_although_rounding_differs() -> None:
    rounding = TemperatureFit(1.0, error=1e-6, best=1.0, best_error=1e-6)
    servers = {A: Rescored(4e-5, 4e-5, 40.0)}
    found = diagnose(evidence(mismatch=mismatch(1e-6, bias=0.4), fit=rounding, servers=servers))
    assert found.kind == "sampling" and "differs from the entropy by 0.4" in found.words


def test_a_bias_that_other_numerics_bring_along_is_not_called_sampling() -> None:
    assert diagnose(evidence(mismatch=mismatch(0.3, bias=0.4), servers={A: DISAGREE})).kind == "numerics"


def test_top_p_hides_no_difference_of_log_probs() -> None:
    assert diagnose(evidence(top_p=0.9, mismatch=mismatch(0.06))) == diagnose(evidence(mismatch=mismatch(0.06)))


def test_what_could_not_be_found_out_is_told() -> None:
    assert diagnose(evidence(notes=("not scored again: HTTP 503",))).words.endswith("(not scored again: HTTP 503)")


def test_ids_that_are_not_those_of_the_text_are_told_apart_from_an_engine_that_got_others() -> None:
    ours = replace(WRONG_PROMPTS, retokenized=8, retokenized_otherwise=8)
    assert "not those of the prompt's text for 8 of 8" in diagnose(evidence(prompt_ids=ours)).words
    theirs = replace(WRONG_PROMPTS, retokenized=8)
    assert "are those of the prompts' text" in diagnose(evidence(prompt_ids=theirs)).words


def test_checks_of_replicas_add_up_with_the_first_example() -> None:
    total = merged_checks([PromptIdsCheck(known=2), WRONG_PROMPTS, replace(WRONG_PROMPTS, example="other")])
    assert (total.known, total.different, total.example) == (130, 24, WRONG_PROMPTS.example)
