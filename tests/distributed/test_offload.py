"""memory.offload against real Megatron-Core: what leaves the device comes back, and nothing else changes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.offload_worker import ALL
from tests.support.rank_server import run_ranks
from tests.support.tiny_models import save_tiny

RANKS = 2
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dp2_main_weights": ("llama", {"parallel.data": 2, "model.dtype": "bfloat16"}),
    "dp2_whole_optimizer": (
        "llama",
        {"parallel.data": 2, "model.dtype": "bfloat16", "optimizer.distributed": False},
    ),
    "tp2_float32": ("llama", {"parallel.tensor": 2}),  # whose main weights are the policy's own
    "dp2_ep2": ("qwen3_moe", {"parallel.data": 2, "parallel.expert": 2, "model.dtype": "bfloat16"}),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank of each case found; one job runs all of them."""
    out = tmp_path_factory.mktemp("offload")
    for family in {family for family, _ in CASES.values()}:
        save_tiny(family, out)
    always = {"train.batch_size": 8, "train.micro_batch_size": 2, "optimizer.lr": 1e-3, "algorithm.kl_coef": 0.1}
    jobs = {name: {**always, "model.path": str(out / family), **settings} for name, (family, settings) in CASES.items()}
    (out / "jobs.json").write_text(json.dumps(jobs))
    run_ranks("tests.distributed.offload_worker", [str(out / "jobs.json"), str(out)], RANKS, out)
    return {name: [json.loads((out / f"{name}-{rank}.json").read_text()) for rank in range(RANKS)] for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_a_run_with_offload_is_bit_for_bit_the_run_without(found: dict[str, list[dict[str, Any]]], case: str) -> None:
    for rank in found[case]:
        assert rank["stats"] and rank["weights"]


@pytest.mark.parametrize("case", CASES)
def test_nothing_that_is_offloaded_stays_on_the_device(found: dict[str, list[dict[str, Any]]], case: str) -> None:
    for rank in found[case]:
        assert rank["left"] == rank["left_after_save"] == dict.fromkeys(ALL, 0)
        assert rank["host_bytes"] == rank["optimizer_bytes"] + rank["reference_bytes"] > 0


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_that_was_written_while_the_optimizer_was_away_is_whole(
    found: dict[str, list[dict[str, Any]]], case: str
) -> None:
    for rank in found[case]:
        assert rank["loaded"] and rank["resumed"]
