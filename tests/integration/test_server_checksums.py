"""The digests that SGLang reports are those predicted from Hugging Face tensors; a wrong bit is found and named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.rollout import control
from megatron_rpp.rollout.http import post_json
from megatron_rpp.rollout.server_command import server_environment
from megatron_rpp.rollout.sglang_server import SGLangServer
from megatron_rpp.weight_sync.checksum_report import differences, sampled_out
from megatron_rpp.weight_sync.checksums import ExpectedChecksums
from tests.support.tiny_models import QWEN3_MOE, SHAPE, save_tiny

CHILD = Path(__file__).with_name("sglang_models_child.py")
Reports = list[dict[str, Any]]

# `llama` is untied, `llama3` tied. SGLang has no class of its own for `glm`.
FAMILIES = (
    *("llama", "llama3", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"),
    *("gemma2", "gemma3", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4"),
)
DTYPES = {1: "float32", 2: "bfloat16", 3: "float32"}  # by TP size
# Keys of hub checkpoints that SGLang reads and transformers 5 no longer writes.
CONFIG_KEYS = {
    "gemma2": {"hidden_act": "gelu_pytorch_tanh"},
    "deepseek_v2": {"moe_layer_freq": 1, "scoring_func": "softmax"},
    "deepseek_v3": {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write_model(family: str, out: Path, dtype: torch.dtype) -> Path:
    """The tiny model with its weights in `dtype`, as the trainer would send them."""
    if family == "qwen3_moe":  # SGLang gives every layer experts, whatever mlp_only_layers says
        torch.manual_seed(7)
        folder = out / family
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **{**QWEN3_MOE, "mlp_only_layers": []})).save_pretrained(folder)
    else:
        folder = save_tiny(family, out)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | CONFIG_KEYS.get(family, {})))
    in_dtype = {n: t if n.endswith("_correction_bias") else t.to(dtype) for n, t in tensors_of(folder).items()}
    save_file(in_dtype, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def predicted(folder: Path, tp_size: int, skip: tuple[str, ...] = ()) -> list[dict[str, str]]:
    expected = ExpectedChecksums(read_hf_config(str(folder)), [tp_size], skip=skip)
    for name, tensor in tensors_of(folder).items():
        expected.add(name, tensor)
    return expected.result()[tp_size]


def names(report: Mapping[str, Any]) -> set[str]:
    return set(report["checksums"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, list[Path]]:
    """The tiny models by the TP size at which they are loaded; beside config.json, what the checker said of each.

    At TP 3 SGLang on CPU pads heads, widths and vocabulary: 4 and 2 heads, 48 and 20 wide, 19 tokens. It then takes
    hidden_size / padded heads for the size of a Mixtral head, and loads it wrongly.
    """
    out = tmp_path_factory.mktemp("families")
    folders, runs = {}, []
    for tp_size, dtype in DTYPES.items():
        families = [family for family in FAMILIES if tp_size != 3 or family != "mixtral"]
        (out / str(tp_size)).mkdir()
        folders[tp_size] = [write_model(family, out / str(tp_size), getattr(torch, dtype)) for family in families]
        runs += [(tp_size, dtype, str(folder)) for folder in folders[tp_size]]
    command = [sys.executable, str(CHILD), str(out / "reports.json"), json.dumps(runs)]
    env = server_environment(os.environ, RolloutConfig(server_tensor=max(DTYPES)), "cpu")
    log = out / "child.log"
    with log.open("wb") as stream:
        done = subprocess.run(command, env=env, stdout=stream, stderr=subprocess.STDOUT, timeout=500)
    assert done.returncode == 0, log.read_text()[-3000:]
    for folder, reports in json.loads((out / "reports.json").read_text()).items():
        (Path(folder) / "reports.json").write_text(json.dumps(reports))
    return folders


@pytest.mark.parametrize("tp_size", DTYPES)
def test_every_family_s_own_sglang_class_holds_what_is_predicted(
    tp_size: int, models: Mapping[int, list[Path]]
) -> None:
    reports: dict[Path, Reports] = {f: json.loads((f / "reports.json").read_text()) for f in models[tp_size]}
    found = {folder.name: differences(predicted(folder, tp_size), reports[folder]) for folder in models[tp_size]}
    assert len(found) >= len(FAMILIES) - 1 and found == {family: [] for family in found}


def ask(running: SGLangServer, skip: tuple[str, ...] = ()) -> Reports:
    return control.checksums(running.url, skip, 60.0)


def with_one_bit_flipped(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1:].view(torch.uint8)[0] ^= 1
    return changed


def load(running: SGLangServer, folder: Path) -> None:
    post_json(running.url, "update_weights_from_disk", {"model_path": str(folder), "flush_cache": False}, 60.0)


def test_a_running_server_is_verified_and_a_flipped_bit_is_named(
    sglang_server: SGLangServer, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Tied weights and two ranks on running servers are test_sync_layouts'."""
    right = predicted(tiny_model_dir, 1)
    assert differences(right, ask(sglang_server)) == []
    assert len(right[0]) == 15
    skip = sampled_out(num_layers=2, version=5)
    asked = ask(sglang_server, skip)
    assert differences(predicted(tiny_model_dir, 1, skip), asked, skip) == []
    assert {name for name in names(asked[0]) if ".layers." in name} == {n for n in right[0] if ".layers.1." in n}

    wrong = "model.layers.0.self_attn.k_proj.weight"
    folder = tmp_path / "wrong"
    shutil.copytree(tiny_model_dir, folder)
    tensors = tensors_of(tiny_model_dir)
    flipped = tensors | {wrong: with_one_bit_flipped(tensors[wrong])}
    save_file(flipped, folder / "model.safetensors", metadata={"format": "pt"})
    load(sglang_server, folder)
    try:
        (line,) = differences(right, ask(sglang_server))
    finally:
        load(sglang_server, tiny_model_dir)  # for the tests after this one
    assert line.startswith("model.layers.0.self_attn.qkv_proj.weight on TP rank 0: the server's ")
    assert wrong in line
    assert differences(right, ask(sglang_server)) == []
