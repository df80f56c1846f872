"""The bodies of tests/gpu run on CPU, tiny and with local layers. What they find out there is a GPU's to say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_rpp.config.load import load_config
from tests.gpu import recipes, test_fp8_training
from tests.gpu.cpu_worker import BODIES
from tests.gpu.site import llama_config
from tests.gpu.test_colocated import assert_away_while_sampling, demo_settings, same_bytes
from tests.gpu.test_fp8_scales import scales_of_one
from tests.gpu.test_fp8_training import within_noise
from tests.gpu.test_groups import CONTEXT, TENSOR
from tests.gpu.test_offload import EVERYTHING
from tests.support.rank_server import run_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("bodies")
    run_ranks("tests.gpu.cpu_worker", [str(out)], 1, out)
    outcomes: dict[str, str] = json.loads((out / "found.json").read_text())
    return outcomes


@pytest.mark.parametrize("body", BODIES)
def test_a_body_runs_on_cpu(found: dict[str, str], body: str) -> None:
    assert found[body] == "ok", found[body]


def test_ranks_of_a_layout_give_the_log_probs_and_gradient_of_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, found = tmp_path / "llama", {}
    LlamaForCausalLM(llama_config(is_tiny=True)).save_pretrained(model)
    for layout, size in (("one", 1), (CONTEXT, 2), (TENSOR, 2)):
        file = tmp_path / f"{layout}.pt"
        run_ranks("tests.gpu.layout_worker", [str(model), str(file), "tiny", layout], size, tmp_path / layout)
        found[layout] = torch.load(file)
    one = found.pop("one")
    for layout, two in found.items():
        difference = (one["logprobs"] - two["logprobs"]).abs().mean()
        assert 0 < difference < 5e-3, f"{layout}: another order of bfloat16 sums, and not the same run twice"
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.05), layout


def test_a_gpu_without_fp8_has_no_recipe_for_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    for here, expected in (
        ((), None),
        (("delayed", "tensorwise"), "tensorwise"),
        (("tensorwise", "blockwise"), "blockwise"),
    ):
        monkeypatch.setattr(recipes, "recipes_here", lambda here=here: here)
        assert recipes.recipe_of_parameters() == expected
    monkeypatch.setattr(test_fp8_training, "recipe_of_parameters", lambda: None)
    nowhere: Any = None
    with pytest.raises(pytest.skip.Exception, match="no recipe for FP8 parameters"):
        test_fp8_training.test_fp8_parameters_train_within_noise_of_bfloat16(nowhere)


def test_a_matrix_of_other_bytes_is_found() -> None:
    """Negative zero is equal to zero, and other bytes."""
    x = torch.zeros(2, 2)
    assert same_bytes(x, x.clone()) and not same_bytes(x, -x) and not same_bytes(x, x.bfloat16())


def test_the_settings_of_the_colocated_loop_are_settings(tmp_path: Path) -> None:
    config = load_config([], demo_settings(tmp_path / "demo", tmp_path / "run", "http://127.0.0.1:1"))
    assert config.weight_sync.transports == ("ipc", "disk") and config.rollout.urls == ("http://127.0.0.1:1",)
    assert config.rollout.release_memory and config.memory.offload == EVERYTHING
    assert config.data.train.path == str(tmp_path / "demo" / "problems.jsonl")


def test_noise_is_twice_the_spread_of_seeds_but_no_less_than_the_floor() -> None:
    """Against the runs of the same seeds: the first ones."""
    assert within_noise([1.1, 1.1], [1.0, 1.1, 1.2]) and within_noise([1.24, 1.24], [1.0, 1.1, 1.2])
    assert not within_noise([1.26, 1.26], [1.0, 1.1, 1.2])
    assert within_noise([1.019], [1.0, 1.0]) and not within_noise([0.97], [1.0, 1.0])


def test_an_optimizer_that_stays_while_servers_sample_is_found() -> None:
    step = {"memory/peak_gib/train": 20.0, "memory/allocated_gib/rollout": 4.0}
    assert_away_while_sampling(step, parameters=2**30)
    with pytest.raises(AssertionError, match=r"16\.0000 was to be away"):
        assert_away_while_sampling(step | {"memory/allocated_gib/rollout": 12.0}, parameters=2**30)


def test_a_layer_whose_scales_are_still_one_is_found() -> None:
    settled, fresh, plain = (torch.nn.Linear(1, 1) for _ in range(3))
    # The last of a product's scales is the output's, which is not quantized.
    forward = [SimpleNamespace(scale=torch.tensor([7.0, scale, 1.0])) for scale in (7.0, 1.0)]
    backward = SimpleNamespace(scale=torch.tensor([7.0, 1.0]))
    vars(settled)["fp8_meta"] = {"scaling_fwd": forward[0], "scaling_bwd": backward}
    vars(fresh)["fp8_meta"] = {"scaling_fwd": forward[1]}
    model: Any = SimpleNamespace(chunks=[torch.nn.Sequential(settled, fresh, plain)])
    assert scales_of_one(model, "scaling_fwd") == scales_of_one(model, "scaling_bwd") == ["1"]
