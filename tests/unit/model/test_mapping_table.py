"""The name table: what a Megatron name maps to, and that no tensor of a family is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from megatron_rpp.model.hf_mapping import LLAMA, QWEN2, QWEN3, family_of, read_hf_config
from megatron_rpp.model.hf_mapping.transforms import QKV, Direct, GateUp, Vocab
from tests.support.tiny_models import FAMILY_NAMES, save_tiny


@pytest.mark.parametrize(
    ("megatron", "hf", "transform"),
    [
        ("embedding.word_embeddings.weight", ["model.embed_tokens.weight"], Vocab()),
        ("output_layer.weight", ["lm_head.weight"], Vocab()),
        ("decoder.final_layernorm.weight", ["model.norm.weight"], Direct()),
        (
            "decoder.layers.12.self_attention.linear_qkv.weight",
            [f"model.layers.12.self_attn.{part}_proj.weight" for part in "qkv"],
            QKV(),
        ),
        ("decoder.layers.12.self_attention.linear_proj.weight", ["model.layers.12.self_attn.o_proj.weight"], Direct()),
        (
            "decoder.layers.0.mlp.linear_fc1.weight",
            ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"],
            GateUp(),
        ),
        ("decoder.layers.3.mlp.linear_fc2.weight", ["model.layers.3.mlp.down_proj.weight"], Direct()),
    ],
)
def test_find_gives_names_with_the_layer_index_and_the_transform(
    megatron: str, hf: list[str], transform: object
) -> None:
    rule, names = LLAMA.find(megatron)
    assert list(names) == hf and rule.transform == transform


@pytest.mark.parametrize(
    ("local", "fused", "hf"),
    [
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
    ],
)
def test_local_and_transformer_engine_norms_are_the_same_tensor(local: str, fused: str, hf: str) -> None:
    for name in (local, fused):
        assert LLAMA.find(f"decoder.layers.7.{name}")[1] == (f"model.layers.7.{hf}",)


def test_only_the_families_that_have_them_map_biases_and_head_norms() -> None:
    bias, norm = "decoder.layers.1.self_attention.linear_qkv.bias", "decoder.layers.1.self_attention.k_layernorm.weight"
    assert QWEN2.find(bias)[1] == tuple(f"model.layers.1.self_attn.{p}_proj.bias" for p in "qkv")
    assert QWEN3.find(norm)[1] == ("model.layers.1.self_attn.k_norm.weight",)
    for family, name in ((LLAMA, bias), (LLAMA, norm), (QWEN2, norm), (QWEN3, bias)):
        with pytest.raises(KeyError, match=name):
            family.find(name)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.1.self_attention.linear_qkv.weight_extra",  # a prefix is not a match
        "prefix.decoder.final_layernorm.weight",
        "decoderXfinal_layernorm.weight",  # the dot is not a wildcard
        "decoder.layers.x.mlp.linear_fc2.weight",
    ],
)
def test_a_parameter_without_a_rule_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(KeyError, match="no rule maps"):
        LLAMA.find(name)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_table_and_transformers_checkpoint_have_the_same_names(family: str, tmp_path: Path) -> None:
    """A tensor that no rule names would keep its random initial value, silently."""
    path = save_tiny(family, tmp_path)
    hf = read_hf_config(str(path))
    with safe_open(str(path / "model.safetensors"), "pt") as f:
        stored = set(f.keys())
    named = family_of(hf).hf_names(hf)
    assert named - ({"lm_head.weight"} if hf.tied_embeddings else set()) == stored


def test_unknown_architecture_error_lists_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    with pytest.raises(ValueError, match=r"MambaForCausalLM.*LlamaForCausalLM, Mistral.*, Qwen2.*, Qwen3ForCausalLM"):
        read_hf_config(str(tmp_path))
