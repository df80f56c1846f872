"""Overlapped communication and recomputed activations change no gradient and no weight, on real layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.rank_server import run_ranks
from tests.support.tiny_models import save_tiny

RANKS = 4
REDUCE = {"optimizer.overlap_grad_reduce": True}
BOTH = {**REDUCE, "optimizer.overlap_param_gather": True}
FULL = {"memory.recompute": "full"}


def selective(*modules: str) -> dict[str, Any]:
    return {"memory.recompute": "selective", "memory.recompute_modules": modules}


OVERLAP = {"grad_reduce": REDUCE, "grad_reduce_and_param_gather": BOTH}
CASES: dict[str, tuple[str, dict[str, int | bool], dict[str, dict[str, Any]]]] = {
    "dp4": ("llama", {"data": 4}, OVERLAP),
    "dp2_pp2": (
        "llama",
        {"data": 2, "pipeline": 2},
        {
            **OVERLAP,
            "full": FULL,
            "full_and_overlap": {**FULL, **BOTH},
            "core_attn": selective("core_attn"),
            "mlp": selective("mlp"),
            "layernorm": selective("layernorm"),
        },
    ),
    "dp2_pp2_vpp2": ("llama", {"data": 2, "pipeline": 2, "virtual_pipeline": 2}, {**OVERLAP, "full": FULL}),
    "experts_dp4_ep2": (
        "deepseek_v3",
        {"data": 4, "expert": 2},
        {
            **OVERLAP,
            "full": FULL,
            "moe": selective("moe"),
            "latent_attention": selective("mla_up_proj", "core_attn"),
            "shared_experts": selective("shared_experts", "mlp"),
        },
    ),
}
VARIANTS = [(case, name) for case, (_, _, variants) in CASES.items() for name in variants]
SAVES_LESS = ("full", "full_and_overlap", "mlp", "moe")  # torch's attention keeps no scores in any case
pytestmark = pytest.mark.timeout(400)  # the first test waits for all cases


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank found, by case."""
    out, jobs = tmp_path_factory.mktemp("speed"), {}
    for case, (family, layout, variants) in CASES.items():
        settings = {
            "model.path": str(save_tiny(family, out / "models")),
            "model.layer_spec": "local",
            "rollout.num_prompts": 4,
            "train.batch_size": 16,
            "train.micro_batch_size": 1,
            "optimizer.lr": 0.3,
            "optimizer.adam_eps": 1.0,  # so large that an update is as large as its gradient
            "optimizer.clip_grad": 0.0,
            **{f"parallel.{key}": value for key, value in layout.items()},
        }
        jobs[case] = {"settings": settings, "variants": variants, "bfloat16": case == "dp4"}
    (out / "jobs.json").write_text(json.dumps(jobs))
    run_ranks("tests.distributed.speed_worker", [str(out / "jobs.json"), str(out)], RANKS, out)
    return {case: [_read(out / f"{case}-{rank}.json") for rank in range(RANKS)] for case in CASES}


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize(("case", "variant"), VARIANTS)
def test_weights_and_gradient_norms_after_two_steps_are_those_without(
    results: dict[str, list[dict[str, Any]]], case: str, variant: str
) -> None:
    for rank in results[case]:
        assert rank[variant]["weights"] < 1e-5
        assert rank[variant]["norms"] < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_every_weight_moves(results: dict[str, list[dict[str, Any]]], case: str) -> None:
    """One that does not would prove nothing above. The selection bias of a router is frozen."""
    for rank in results[case]:
        assert [name for name in rank["grad_reduce"]["still"] if "expert_bias" not in name] == []


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_summed_in_several_parts(results: dict[str, list[dict[str, Any]]], case: str) -> None:
    """On the first pipeline stage; in one part nothing would overlap."""
    assert max(rank["grad_reduce"]["buckets"] for rank in results[case]) > 3


@pytest.mark.parametrize(("case", "variant"), VARIANTS)
def test_weights_are_whole_behind_the_end_of_the_gather_alone(
    results: dict[str, list[dict[str, Any]]], case: str, variant: str
) -> None:
    """With overlap a rank has only its own share of an update before; a sync would send old weights."""
    gathers = "param_gather" in variant or variant == "full_and_overlap"
    assert {rank[variant]["gathered_late"] for rank in results[case]} == {gathers}


@pytest.mark.parametrize(("case", "variant"), [(c, v) for c, v in VARIANTS if v in SAVES_LESS])
def test_recomputed_activations_are_not_kept(results: dict[str, list[dict[str, Any]]], case: str, variant: str) -> None:
    for rank in results[case]:
        assert rank[variant]["saved"] < (0.7 if variant.startswith("full") else 0.97)


def test_updates_below_bfloat16s_resolution_add_up_in_float32(results: dict[str, list[dict[str, Any]]]) -> None:
    """No weight above 0.5 sees a step of 0.001 in bfloat16; after a few the main weights have gone far enough."""
    for rank in results["dp4"]:
        first, *_, last = rank["bfloat16"]["moved"]
        assert first == 0 and last > 0.5
