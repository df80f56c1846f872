"""Two replicas of two stages: every rank comes to the same evidence, on the responses of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.parity_worker import CHOSEN, ENGINE_TEMPERATURE, RESPONSES, SERVER_SAYS, TEMPERATURE, URLS
from tests.support.rank_server import run_ranks
from tests.support.tiny_models import save_tiny

RANKS = 4


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that has run; in llama/ its model."""
    out = tmp_path_factory.mktemp("parity")
    model = save_tiny("llama", out)
    run_ranks("tests.distributed.parity_worker", [str(model), str(out)], RANKS, out)
    return out


@pytest.fixture(scope="module")
def on_ranks(out: Path) -> list[list[dict[str, Any]]]:
    """Of each rank, the evidence of the healthy job, with a broken tokenizer, and of servers that were asked first."""
    return [json.loads((out / f"evidence-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def found(on_ranks: list[list[dict[str, Any]]]) -> dict[str, Any]:
    return on_ranks[0][0]


def test_no_two_ranks_differ(on_ranks: list[list[dict[str, Any]]]) -> None:
    assert all(each == on_ranks[0] for each in on_ranks[1:])


def test_prompt_ids_of_all_replicas_are_compared(found: dict[str, Any]) -> None:
    check = found["prompt_ids"]
    assert (check["known"], check["different"]) == (sum(RESPONSES), 1)
    assert "3 tokens here and 2 there" in check["example"]
    assert (check["retokenized"], check["retokenized_otherwise"], check["responses_otherwise"]) == (CHOSEN, 0, 0)


def test_the_temperature_is_fitted_over_all_replicas(found: dict[str, Any]) -> None:
    fit = found["fit"]
    assert fit["best"] == pytest.approx(ENGINE_TEMPERATURE, rel=0.003)
    assert fit["best_error"] < 0.1 * fit["error"]


def test_a_dead_server_is_told_of_and_the_other_one_is_heard(found: dict[str, Any]) -> None:
    assert list(found["servers"]) == [URLS[0]]
    assert len(found["notes"]) == 1 and URLS[1] in found["notes"][0]


def test_log_probs_of_a_server_and_of_the_engine_are_compared_token_by_token(out: Path, found: dict[str, Any]) -> None:
    asked = json.loads((out / "asked-0.json").read_text())
    at_one, configured, engine = (logprobs(out, asked, t) for t in (1.0, TEMPERATURE, ENGINE_TEMPERATURE))
    server = found["servers"][URLS[0]]
    assert server["tokens"] == len(at_one) > 4
    assert server["abs_sum"] == pytest.approx(float((at_one - SERVER_SAYS).abs().sum()), rel=1e-4)
    assert server["engine_abs_sum"] == pytest.approx(float((configured - engine).abs().sum()), rel=1e-4)


def test_a_leader_that_fails_leaves_the_other_ranks_a_note_and_its_scores(
    on_ranks: list[list[dict[str, Any]]], found: dict[str, Any]
) -> None:
    broken = on_ranks[0][1]
    assert any("prompt ids not compared: KeyError" in note for note in broken["notes"])
    assert broken["prompt_ids"]["known"] == RESPONSES[0], "of the other replica"
    assert broken["servers"] == found["servers"]


def test_weights_that_could_not_be_compared_are_not_called_equal(on_ranks: list[list[dict[str, Any]]]) -> None:
    healthy, broken, _ = on_ranks[0]
    assert healthy["stale"] == [] and broken["stale"] is None
    assert any("weights not compared: nobody answers" in note for note in broken["notes"])


def test_servers_that_are_slow_to_answer_before_they_sleep_lose_no_rank(on_ranks: list[list[dict[str, Any]]]) -> None:
    """The ranks that ask nobody wait for the leaders, and one of these has no rollouts to ask about."""
    slow = on_ranks[0][2]
    assert slow["notes"] == [] and slow["stale"] == []
    assert list(slow["servers"]) == [URLS[1]] and slow["servers"][URLS[1]]["tokens"] > 4
    assert slow["prompt_ids"]["known"] == RESPONSES[1]


def logprobs(out: Path, asked: list[tuple[list[int], int]], temperature: float) -> torch.Tensor:
    """transformers' log-probs at `temperature` of all response tokens that a server was asked for."""
    model = AutoModelForCausalLM.from_pretrained(out / "llama", dtype=torch.float32)
    parts = []
    for ids, start in asked:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].double()
        parts.append((logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None])[:, 0])
    return torch.cat(parts)
