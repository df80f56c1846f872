"""config.json of Gemma 2, Gemma 3 and GLM-4: defaults that the hub's files rely on, both transformers generations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.model.hf_config import HFConfig, Rope
from megatron_rpp.model.hf_mapping import read_hf_config

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 7,
    "vocab_size": 101,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}


def read(folder: Path, architecture: str, **keys: Any) -> HFConfig:
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], **SHAPE, **keys}))
    return read_hf_config(str(folder))


def test_gemma2_defaults_are_those_that_the_hubs_config_leaves_out(tmp_path: Path) -> None:
    hf = read(tmp_path, "Gemma2ForCausalLM")
    assert (hf.head_dim, hf.attention_scale, hf.tied_embeddings, hf.max_position_embeddings) == (
        256,
        1 / 16,
        True,
        8192,
    )
    assert (hf.attention_softcap, hf.logits_softcap, hf.sliding_window) == (50.0, 30.0, 4096)
    assert hf.sliding_layers == (True, False, True, False, True, False, True)
    assert (hf.activation, hf.zero_centered_norm, hf.post_norms, hf.qk_norm) == ("gelu_tanh", True, True, False)
    assert hf.embedding_scale == 48**0.5 and hf.sliding_rope is None


def test_a_null_soft_cap_is_none_and_an_absent_one_the_default(tmp_path: Path) -> None:
    hf = read(tmp_path, "Gemma2ForCausalLM", attn_logit_softcapping=None, final_logit_softcapping=7)
    assert (hf.attention_softcap, hf.logits_softcap) == (None, 7)
    hf = read(tmp_path, "Gemma3ForCausalLM")
    assert (hf.attention_softcap, hf.logits_softcap, hf.qk_norm) == (None, None, True)


@pytest.mark.parametrize(
    ("keys", "full_layers"),
    [
        ({}, [5]),
        ({"sliding_window_pattern": 3}, [2, 5]),
        ({"layer_types": ["full_attention", *["sliding_attention"] * 6], "sliding_window_pattern": 3}, [0]),
    ],
)
def test_gemma3_layers_slide_by_list_by_pattern_or_five_of_six(
    tmp_path: Path, keys: dict[str, Any], full_layers: list[int]
) -> None:
    hf = read(tmp_path, "Gemma3ForCausalLM", **keys)
    assert [i for i, slides in enumerate(hf.sliding_layers) if not slides] == full_layers


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR},  # transformers 4
        {
            "rope_parameters": {  # transformers 5
                "full_attention": {"rope_theta": 5e5, **LINEAR},
                "sliding_attention": {"rope_theta": 2e4, "rope_type": "default"},
            }
        },
    ],
)
def test_gemma3_scales_the_rotary_positions_of_full_attention_only(tmp_path: Path, keys: dict[str, Any]) -> None:
    hf = read(tmp_path, "Gemma3ForCausalLM", **keys)
    assert hf.rope.theta == 5e5 and hf.rope.scaling is not None and hf.rope.scaling["factor"] == 8.0
    assert hf.sliding_rope == Rope(2e4)


def test_gemma3_rotary_bases_default_to_a_million_and_ten_thousand(tmp_path: Path) -> None:
    hf = read(tmp_path, "Gemma3ForCausalLM")
    assert (hf.rope, hf.sliding_rope) == (Rope(1e6), Rope(1e4))


def test_glm_rotates_half_of_each_head_in_neighbouring_pairs_and_has_query_biases(tmp_path: Path) -> None:
    for architecture, post_norms in (("GlmForCausalLM", False), ("Glm4ForCausalLM", True)):
        hf = read(tmp_path, architecture)
        assert hf.rope == Rope(10_000.0, fraction=0.5, interleaved=True)
        assert (hf.head_dim, hf.norm_eps, hf.qkv_bias, hf.post_norms) == (128, 1.5625e-07, True, post_norms)
    assert not read(tmp_path, "GlmForCausalLM", attention_bias=False).qkv_bias
    assert read(
        tmp_path, "GlmForCausalLM", rope_parameters={"partial_rotary_factor": 0.25, "rope_theta": 1e4}
    ).rope == (Rope(1e4, fraction=0.25, interleaved=True))


GEMMA2, GEMMA3, GLM = "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GlmForCausalLM"


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        (GEMMA2, {"attention_bias": True}, "attention_bias=True"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (GEMMA2, {"attn_logit_softcapping": 0}, "attn_logit_softcapping=0; it must be a positive number"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        (GEMMA2, {"sliding_window": 0}, "sliding_window=0"),
        (GEMMA3, {"layer_types": ["sliding_attention"]}, "layer_types=['sliding_attention']; it must name"),
        (GEMMA3, {"layer_types": ["linear_attention"] * 7}, "it must name sliding_attention or full_attention"),
        (GEMMA3, {"rope_scaling": {**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 8}}, "'yarn'"),
        (GLM, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("Gemma3ForConditionalGeneration", {}, "a vision model; save its language model alone, as Gemma3ForCausalLM"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(
    tmp_path: Path, architecture: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        read(tmp_path, architecture, **keys)
    assert message in str(error.value) and f"{tmp_path}: its config.json has" in str(error.value)


@pytest.mark.parametrize("architecture", ["Glm4ForCausalLM", "GlmForCausalLM"])
def test_yarn_on_glms_partly_rotated_heads_is_refused(architecture: str, tmp_path: Path) -> None:
    """Its factor is on the rotated dimensions alone, which no scale of the scores can give."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match="partly rotated heads"):
        read(tmp_path, architecture, rope_scaling=yarn)


def test_gemma3_ropes_that_name_no_kind_of_layer_are_refused(tmp_path: Path) -> None:
    """Read as none at all, they would leave the global base at its default."""
    with pytest.raises(ValueError, match="full_attention and sliding_attention"):
        read(tmp_path, "Gemma3ForCausalLM", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
