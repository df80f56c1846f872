"""The bodies of tests/gpu run on CPU, tiny and with local layers: what fails on a GPU is then the GPU's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_rpp.config.load import load_config
from tests.gpu.cpu_worker import BODIES
from tests.gpu.site import llama_config
from tests.gpu.test_colocated import demo_settings
from tests.gpu.test_fp8_training import within_noise
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


def test_the_worker_of_two_gpus_gives_the_log_probs_of_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tmp_path / "llama"
    LlamaForCausalLM(llama_config(is_tiny=True)).save_pretrained(model)
    files = {size: tmp_path / f"{size}.pt" for size in (1, 2)}
    for size, file in files.items():
        run_ranks("tests.gpu.context_worker", [str(model), str(file), "tiny", str(size)], size, tmp_path / str(size))
    one, two = (torch.load(file) for file in files.values())
    assert 0 < (one - two).abs().mean() < 5e-3, "another order of bfloat16 sums, and not the same run twice"


def test_the_settings_of_the_colocated_loop_are_settings(tmp_path: Path) -> None:
    config = load_config([], demo_settings(tmp_path / "demo", tmp_path / "run", "http://127.0.0.1:1"))
    assert config.weight_sync.transports == ("ipc", "disk") and config.rollout.urls == ("http://127.0.0.1:1",)
    assert config.data.train.path == str(tmp_path / "demo" / "problems.jsonl")


def test_noise_is_twice_the_spread_of_seeds_but_no_less_than_the_floor() -> None:
    assert within_noise([1.1, 1.1], [1.0, 1.1, 1.2]) and within_noise([1.29, 1.29], [1.0, 1.1, 1.2])
    assert not within_noise([1.31, 1.31], [1.0, 1.1, 1.2])
    assert within_noise([1.019], [1.0, 1.0]) and not within_noise([0.97], [1.0, 1.0])
