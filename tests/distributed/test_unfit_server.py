"""A healthy server that cannot be verified, as one with another model, costs no step on the others."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import pytest

from tests.distributed.test_sync_experts import receiver
from tests.distributed.unfit_server_worker import MENDED, STEPS
from tests.support.rank_server import run_ranks
from tests.support.tiny_models import MODELS
from tests.support.weight_syncs import write_weights


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, list[dict[str, Any]]]:
    """(the good server, the other, what was found in each step)."""
    out = tmp_path_factory.mktemp("unfit")
    (out / "wrong").touch()
    model = write_weights(MODELS["llama"], 0, out / "model")
    with ExitStack() as stack:
        good, unfit = (stack.enter_context(receiver(out, module)) for module in ("receiver", "wrong_receiver"))
        run_ranks("tests.distributed.unfit_server_worker", [model, str(out), good, unfit], 1, out)
    return good, unfit, json.loads((out / "result.json").read_text())


def test_steps_go_on_with_the_others(steps: tuple[str, str, list[dict[str, Any]]]) -> None:
    good, _, found = steps
    assert len(found) == STEPS
    for step in found[:MENDED]:
        assert step["synced"] == step["sampled"] == [good]


def test_it_is_named_with_its_tensor_and_left_out(steps: tuple[str, str, list[dict[str, Any]]]) -> None:
    _, unfit, found = steps
    for step in found[:MENDED]:
        (left_out,) = [warning for warning in step["warnings"] if "is left out" in warning]
        assert f"at {unfit} is left out" in left_out and "phase verify" in left_out and "model." in left_out


def test_a_sync_of_the_others_does_not_wait_for_it_to_fail_again(
    steps: tuple[str, str, list[dict[str, Any]]],
) -> None:
    good, _, found = steps
    first, second = (step["warnings"] for step in found[:MENDED])
    assert not any(good in warning for warning in (*first, *second))
    assert sum("failed" in warning and "to version 1" in warning for warning in second) == 1, "alone, and once"


def test_once_it_is_mended_it_serves(steps: tuple[str, str, list[dict[str, Any]]]) -> None:
    good, unfit, found = steps
    assert found[MENDED]["sampled"] == [good, unfit]
    assert found[MENDED + 1]["synced"] == [good, unfit]
    assert not found[MENDED + 1]["warnings"]
