"""The digests that SGLang reports are those predicted from Hugging Face tensors; a wrong bit is found and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_rpp.config.schema import RolloutConfig
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.rollout.http import post_json
from megatron_rpp.rollout.server_command import server_environment
from megatron_rpp.rollout.sglang_server import SGLangServer
from megatron_rpp.weight_sync.checksums import ExpectedChecksums, differences, sampled_out
from tests.support.tiny_models import QWEN3_MOE, SHAPE, save_tiny

CHILD = Path(__file__).with_name("sglang_models_child.py")
Reports = list[dict[str, Any]]

# `llama` is untied, `llama3` tied. SGLang has no class of its own for `glm`.
FAMILIES = (
    *("llama", "llama3", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"),
    *("gemma2", "gemma3", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4"),
)
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


def predicted(folder: Path, tp_size: int, skip: tuple[str, ...] = (), **replaced: Tensor) -> list[dict[str, str]]:
    expected = ExpectedChecksums(read_hf_config(str(folder)), [tp_size], skip=skip)
    for name, tensor in (tensors_of(folder) | replaced).items():
        expected.add(name, tensor)
    return expected.result()[tp_size]


def names(report: Mapping[str, Any]) -> set[str]:
    return set(report["checksums"])


@pytest.mark.parametrize(("tp_size", "dtype"), [(1, "float32"), (2, "bfloat16"), (3, "float32")])
def test_every_family_s_own_sglang_class_holds_what_is_predicted(tp_size: int, dtype: str, tmp_path: Path) -> None:
    """At TP 3 SGLang on CPU pads heads, widths and vocabulary: 4 and 2 heads, 48 and 20 wide, 19 tokens.

    It then takes hidden_size / padded heads for the size of a Mixtral head, and loads it wrongly.
    """
    families = [family for family in FAMILIES if tp_size != 3 or family != "mixtral"]
    folders = [write_model(family, tmp_path, getattr(torch, dtype)) for family in families]
    out, log = tmp_path / "reports.json", tmp_path / "child.log"
    command = [sys.executable, str(CHILD), str(tp_size), dtype, str(out), *map(str, folders)]
    env = server_environment(os.environ, RolloutConfig(server_tensor=tp_size), "cpu")
    with log.open("wb") as stream:
        done = subprocess.run(command, env=env, stdout=stream, stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == 0, log.read_text()[-3000:]
    reports: dict[str, Reports] = json.loads(out.read_text())
    found = {folder.name: differences(predicted(folder, tp_size), reports[str(folder)]) for folder in folders}
    assert found == {family: [] for family in families}


@contextmanager
def server(folder: Path, dtype: str, tp_size: int) -> Iterator[SGLangServer]:
    rollout = RolloutConfig(context_length=32, max_response_tokens=8, server_tensor=tp_size)
    running = SGLangServer(str(folder), rollout, dtype=dtype, log_path=folder / "sglang.log")
    running.start()
    try:
        running.wait_ready(rollout.startup_deadline_s)
        yield running
    finally:
        running.stop()


def ask(running: SGLangServer, skip: tuple[str, ...] = ()) -> Reports:
    payload: dict[str, object] = {"action": "checksum", "selector": "target", "skip_tensor_list": list(skip)}
    ranks = post_json(running.url, "weights_checker", payload, 60.0)["ranks"]
    assert isinstance(ranks, list)
    return ranks


def with_one_bit_flipped(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1:].view(torch.uint8)[0] ^= 1
    return changed


def load(running: SGLangServer, folder: Path, **replaced: Tensor) -> None:
    save_file(tensors_of(folder) | replaced, folder / "model.safetensors", metadata={"format": "pt"})
    post_json(running.url, "update_weights_from_disk", {"model_path": str(folder), "flush_cache": False}, 60.0)


def test_a_running_server_with_tied_weights_is_verified_and_a_flipped_bit_is_named(tmp_path: Path) -> None:
    folder = write_model("qwen3", tmp_path, torch.float32)
    with server(folder, "float32", 1) as running:
        right = predicted(folder, 1)
        assert differences(right, ask(running)) == []
        assert len(right[0]) == 34
        skip = sampled_out(num_layers=4, version=5)
        asked = ask(running, skip)
        assert differences(predicted(folder, 1, skip), asked, skip) == []
        assert {name for name in names(asked[0]) if ".layers." in name} == {n for n in right[0] if ".layers.1." in n}

        wrong = "model.layers.2.self_attn.k_proj.weight"
        load(running, folder, **{wrong: with_one_bit_flipped(tensors_of(folder)[wrong])})
        (line,) = differences(right, ask(running))
        assert line.startswith("model.layers.2.self_attn.qkv_proj.weight on TP rank 0: the server's ")
        assert wrong in line


def test_a_running_tp2_server_with_biases_and_one_key_head_is_verified_rank_by_rank(tmp_path: Path) -> None:
    """SGLang on CPU pads the key head, and with it the query heads, to what two ranks share."""
    torch.manual_seed(3)
    folder = tmp_path / "qwen2"
    shape = {**SHAPE, "num_key_value_heads": 1, "num_hidden_layers": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.to(torch.bfloat16).save_pretrained(folder)
    with server(folder, "bfloat16", 2) as running:
        right = predicted(folder, 2)
        assert differences(right, ask(running)) == []
        # Gate rows 24 to 47 are rank 1's, and the last embedding row is rank 0's of two blocks of 32.
        for wrong, server_name, rank in (
            ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.gate_up_proj.weight", 1),
            ("model.embed_tokens.weight", "model.embed_tokens.weight", 0),
        ):
            changed = with_one_bit_flipped(tensors_of(folder)[wrong])
            (line,) = differences(predicted(folder, 2, **{wrong: changed}), ask(running))
            assert line.startswith(f"{server_name} on TP rank {rank}: the server's ")
