"""Latent attention and multi-token prediction layers through both conversions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rpp.conversion.megatron_reader import MegatronTensors
from megatron_rpp.conversion.to_hf import ToHF, convert_to_hf
from megatron_rpp.conversion.to_megatron import ToMegatron, convert_to_megatron
from tests.support.mtp import add_mtp
from tests.support.tiny_models import save_tiny


@pytest.fixture(params=["deepseek_v3", "glm4_moe", "mla_dense"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = save_tiny(request.param, tmp_path)
    add_mtp(folder)
    return folder


def num_mtp_layers(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"])


def test_kept_mtp_layers_come_back_bit_for_bit(path: Path, tmp_path: Path) -> None:
    convert_to_megatron(ToMegatron(str(path), str(tmp_path / "m"), tensor=2))
    convert_to_hf(ToHF(str(tmp_path / "m"), str(tmp_path / "h")))
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "h", path))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert num_mtp_layers(tmp_path / "m") == num_mtp_layers(tmp_path / "h") == 1


@pytest.mark.parametrize("where", ["to_megatron", "to_hf"])
def test_dropped_mtp_layers_are_left_out_and_config_json_says_so(path: Path, where: str, tmp_path: Path) -> None:
    first = "drop" if where == "to_megatron" else "keep"
    convert_to_megatron(ToMegatron(str(path), str(tmp_path / "m"), mtp=first))
    assert any(key.startswith("mtp.") for key in MegatronTensors(tmp_path / "m").tensors) == (first == "keep")
    convert_to_hf(ToHF(str(tmp_path / "m"), str(tmp_path / "h"), mtp="drop" if where == "to_hf" else "keep"))
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "h", path))
    assert found.keys() == {name for name in expected if not name.startswith("model.layers.4.")}
    assert num_mtp_layers(tmp_path / "h") == 0


@pytest.mark.parametrize("leaf", ["embed_tokens", "shared_head.head"])
def test_a_copy_that_is_none_is_an_error_that_names_it(leaf: str, tmp_path: Path) -> None:
    path = save_tiny("mla_dense", tmp_path)
    add_mtp(path)
    tensors, name = load_file(path / "model.safetensors"), f"model.layers.4.{leaf}.weight"
    save_file({**tensors, name: tensors[name] + 1}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name):
        convert_to_megatron(ToMegatron(str(path), str(tmp_path / "kept")))
    convert_to_megatron(ToMegatron(str(path), str(tmp_path / "dropped"), mtp="drop"))


def test_latent_norms_are_stored_under_transformer_engines_names(tmp_path: Path) -> None:
    """It fuses them into the up-projections, and a dense layer's second norm into the MLP."""
    convert_to_megatron(ToMegatron(str(save_tiny("deepseek_v3", tmp_path)), str(tmp_path / "m")))
    keys = set(MegatronTensors(tmp_path / "m").tensors)
    norms = {
        "input_layernorm.weight",
        "self_attention.linear_q_up_proj.layer_norm_weight",
        "self_attention.linear_kv_up_proj.layer_norm_weight",
    }
    assert {f"decoder.layers.{i}.{norm}" for i in range(4) for norm in norms} < keys
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in keys
    assert {f"decoder.layers.{i}.pre_mlp_layernorm.weight" for i in (1, 2, 3)} < keys
