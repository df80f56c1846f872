"""Multi-token prediction layers in the name table: kept or dropped, and what they repeat of the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.hf_io.tensors import HFTensors
from megatron_rpp.model.hf_mapping import family_of, read_hf_config
from megatron_rpp.model.hf_mapping.mtp import is_mtp, mtp_copies, stored_mtp, without_mtp
from megatron_rpp.model.hf_mapping.transforms import Copied, Shard, Vocab
from megatron_rpp.model.mtp_export import mtp_changes, open_mtp, with_mtp_layers
from tests.support.mtp import add_mtp
from tests.support.tiny_models import save_tiny

FAMILIES = ["deepseek_v3", "glm4_moe", "mla_dense"]
COPIES = {
    "model.layers.4.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.4.shared_head.head.weight": "lm_head.weight",
}


@pytest.fixture(params=FAMILIES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = save_tiny(request.param, tmp_path)
    add_mtp(folder)
    return folder


def read(path: Path) -> tuple[HFConfig, HFTensors]:
    tensors = HFTensors(str(path))
    return stored_mtp(read_hf_config(str(path)), tensors.names), tensors


def test_table_and_a_hub_checkpoint_have_the_same_names(path: Path) -> None:
    hf, tensors = read(path)
    assert hf.num_mtp_layers == 1 and family_of(hf).hf_names(hf) == set(tensors.names)
    assert mtp_copies(hf) == COPIES


def test_without_mtp_layers_the_table_has_none_of_their_names(path: Path) -> None:
    hf, tensors = read(path)
    dropped = without_mtp(hf)
    names = family_of(dropped).hf_names(dropped)
    assert names == {name for name in tensors.names if not is_mtp(name, hf)}
    with pytest.raises(ValueError, match=r"model\.layers\.4\."):
        tensors.require_no_others(names)


@pytest.mark.parametrize(
    ("megatron", "name"),
    [
        ("enorm", "enorm"),
        ("hnorm", "hnorm"),
        ("eh_proj", "eh_proj"),
        ("final_layernorm", "shared_head.norm"),
        ("transformer_layer.self_attention.linear_proj", "self_attn.o_proj"),
        ("mtp_model_layer.self_attention.linear_proj", "self_attn.o_proj"),  # megatron-core after 0.16
    ],
)
def test_megatrons_names_of_an_mtp_layer_are_those_of_the_layer_behind_the_last(
    path: Path, megatron: str, name: str
) -> None:
    found = family_of(read(path)[0]).find(f"mtp.layers.0.{megatron}.weight")[1]
    assert found == (f"model.layers.4.{name}.weight",)


def test_what_transformers_wrote_claims_mtp_layers_that_it_does_not_hold(tmp_path: Path) -> None:
    """DeepseekV3Config's default is one layer; transformers never saves its tensors."""
    path = save_tiny("deepseek_v3", tmp_path)
    config = json.loads((path / "config.json").read_text())
    del config["num_nextn_predict_layers"]
    (path / "config.json").write_text(json.dumps(config))
    assert read_hf_config(str(path)).num_mtp_layers == 1
    assert read(path)[0].num_mtp_layers == 0


def test_a_config_that_denies_stored_mtp_layers_is_not_believed(path: Path) -> None:
    """Whoever switches them off in config.json leaves their tensors behind."""
    denied = replace(read_hf_config(str(path)), num_mtp_layers=0)
    assert stored_mtp(denied, HFTensors(str(path)).names).num_mtp_layers == 1


def test_a_source_without_copies_needs_none(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n not in COPIES}, path / "model.safetensors")
    hf, stored = read(path)
    assert hf.num_mtp_layers == 1 and family_of(hf).hf_names(hf) == set(stored.names)


def test_megatron_names_also_tell_that_mtp_layers_are_stored(path: Path) -> None:
    hf = read_hf_config(str(path))
    assert stored_mtp(hf, ["decoder.final_layernorm.weight", "mtp.layers.0.enorm.weight"]) == hf
    assert stored_mtp(hf, ["decoder.final_layernorm.weight"]).num_mtp_layers == 0


def test_a_copy_is_checked_when_read_and_written_again() -> None:
    embedding, hf = torch.randn(19, 4), replace(HFConfig(*[None] * 12), vocab_size=19)  # type: ignore[arg-type]
    transform, shard = Copied(Vocab(), 2), Shard(0, 0, 1, 20)
    padded = transform.split([embedding, embedding.clone()], shard, hf)
    assert all(torch.equal(tensor, embedding) for tensor in transform.merge([padded], 0, hf))
    assert len(transform.merge([padded], 0, hf)) == 2
    with pytest.raises(ValueError, match="number 2 of them must be a copy of the first"):
        transform.split([embedding, embedding + 1], shard, hf)


def test_an_exported_directory_takes_mtp_layers_from_the_source_and_copies_from_the_trained_model(path: Path) -> None:
    stored = load_file(path / "model.safetensors")
    first = {"model.embed_tokens.weight": torch.randn(19, 32)}
    last = {"lm_head.weight": torch.randn(19, 32)}
    files = open_mtp(str(path), "keep")
    found = {
        **dict(with_mtp_layers(str(path), files, iter(first.items()), is_last_stage=False)),
        **dict(with_mtp_layers(str(path), files, iter(last.items()), is_last_stage=True)),
    }
    assert {**first, **last}.keys() <= found.keys()
    found = {name: tensor for name, tensor in found.items() if name not in (*first, *last)}
    assert found.keys() == {name for name in stored if name.startswith("model.layers.4.")}
    for name, tensor in found.items():
        assert torch.equal(tensor, {**first, **last}[COPIES[name]] if name in COPIES else stored[name]), name


def test_config_json_of_a_directory_without_them_says_so(path: Path) -> None:
    assert mtp_changes(str(path), list(load_file(path / "model.safetensors"))) == {}
    assert mtp_changes(str(path), ["lm_head.weight"]) == {"num_nextn_predict_layers": 0}
