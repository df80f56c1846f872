"""Two replicas of two stages: every rank comes to the same evidence, on the responses of all."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from megatron_rpp.parallel.local_launch import launch_local
from tests.support.tiny_models import save_tiny
from tests.unit.parity.ranks_worker import CHOSEN, ENGINE_TEMPERATURE, RESPONSES, URLS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The evidence of each rank."""
    out = tmp_path_factory.mktemp("ranks")
    model = save_tiny("llama", out)
    argv = [sys.executable, "-m", "tests.unit.parity.ranks_worker", str(model), str(out)]
    assert launch_local(argv, 4, out) == 0, f"see {out}/logs"
    return [json.loads((out / f"evidence-{rank}.json").read_text()) for rank in range(4)]


def test_no_two_ranks_differ(found: list[dict[str, Any]]) -> None:
    assert all(each == found[0] for each in found[1:])


def test_prompt_ids_of_all_replicas_are_compared(found: list[dict[str, Any]]) -> None:
    context = found[0]["context"]
    assert (context["known"], context["different"]) == (sum(RESPONSES), 1)
    assert "3 tokens here and 2 there" in context["example"]
    assert (context["retokenized"], context["retokenized_otherwise"], context["responses_otherwise"]) == (CHOSEN, 0, 0)


def test_the_temperature_is_fitted_over_all_replicas(found: list[dict[str, Any]]) -> None:
    fit = found[0]["fit"]
    assert fit["best"] == pytest.approx(ENGINE_TEMPERATURE, rel=0.003)
    assert fit["best_error"] < 0.1 * fit["error"]


def test_a_dead_server_is_told_of_and_the_other_one_is_heard(found: list[dict[str, Any]]) -> None:
    assert list(found[0]["servers"]) == [URLS[0]]
    assert found[0]["servers"][URLS[0]]["tokens"] > 0
    assert len(found[0]["notes"]) == 1 and URLS[1] in found[0]["notes"][0]
