"""config.json: both transformers generations are read; what we would compute wrongly is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_rpp.model.hf_config import HFConfig, Rope
from megatron_rpp.model.hf_mapping import read_hf_config
from tests.support.tiny_models import FAMILY_NAMES, save_tiny

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-5,
    "vocab_size": 101,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(folder: Path, **changes: Any) -> HFConfig:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return read_hf_config(str(folder))


def test_every_size_comes_from_its_own_key(tmp_path: Path) -> None:
    found = read(tmp_path, num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True)
    assert found == HFConfig(
        architecture="LlamaForCausalLM",
        num_layers=3,
        hidden_size=48,
        ffn_hidden_size=96,
        num_attention_heads=6,
        num_query_groups=2,
        head_dim=16,
        vocab_size=101,
        norm_eps=1e-5,
        rope=Rope(10_000.0),
        max_position_embeddings=512,
        tied_embeddings=True,
    )


@pytest.mark.parametrize("absent", [{}, {"num_key_value_heads": None, "head_dim": None}])
def test_absent_key_value_heads_and_head_dim_follow_from_the_heads(tmp_path: Path, absent: dict[str, None]) -> None:
    found = read(tmp_path, **absent)
    assert (found.num_query_groups, found.head_dim, found.tied_embeddings) == (6, 8, False)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_scaling": None},  # transformers 4
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},  # transformers 5
    ],
)
def test_rope_theta_is_read_as_transformers_4_and_5_write_it(tmp_path: Path, keys: dict[str, Any]) -> None:
    assert read(tmp_path, **keys).rope == Rope(5e5)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},  # transformers 4
        {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}},  # transformers 5
    ],
)
def test_llama3_rope_scaling_is_read_with_its_factor(tmp_path: Path, keys: dict[str, Any]) -> None:
    rope = read(tmp_path, **keys).rope
    assert rope.scaling is not None and rope.scaling["factor"] == 32.0 and rope.theta == 5e5


def test_a_sliding_window_is_mistrals_alone_and_its_absence_is_transformers_default(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert read(tmp_path, **mistral, sliding_window=None).sliding_window is None
    assert read(tmp_path, **mistral, sliding_window=64).sliding_window == 64
    assert read(tmp_path, **mistral).sliding_window == 4096
    assert read(tmp_path, sliding_window=64).sliding_window is None
    assert read(tmp_path, **mistral, num_attention_heads=16).num_query_groups == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor=None beside rope_type='llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor=None beside rope_type='yarn'"),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "original_max_position_embeddings": 64,
                    "mscal": 1.0,
                }
            },
            "mscal=1.0 beside",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'; it must be a JSON object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'; it must be a number above 0"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": -1}, "sliding_window=-1; it must be a positive"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": True}, "sliding_window=True; it must be"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"attention_bias": True, "architectures": ["Qwen3ForCausalLM"]}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"use_sliding_window": True, "architectures": ["Qwen2ForCausalLM"]}, "use_sliding_window=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        read(tmp_path, **changes)
    assert message in str(error.value) and f"{tmp_path}: its config.json has" in str(error.value)


def test_qwen2_has_query_biases_and_qwen3_head_norms_though_no_key_says_so(tmp_path: Path) -> None:
    qwen2 = read(tmp_path, architectures=["Qwen2ForCausalLM"])
    qwen3 = read(tmp_path, architectures=["Qwen3ForCausalLM"], head_dim=8)
    assert (qwen2.qkv_bias, qwen2.qk_norm) == (True, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm) == (False, True)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_config_that_installed_transformers_wrote_is_read(family: str, tmp_path: Path) -> None:
    path = str(save_tiny(family, tmp_path))
    found, theirs = read_hf_config(path), AutoConfig.from_pretrained(path)
    assert (found.num_layers, found.num_attention_heads) == (theirs.num_hidden_layers, theirs.num_attention_heads)
    assert found.mla or found.num_query_groups == theirs.num_key_value_heads
    assert found.mla or found.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert (found.hidden_size, found.ffn_hidden_size) == (theirs.hidden_size, theirs.intermediate_size)
    assert (found.vocab_size, found.norm_eps) == (theirs.vocab_size, theirs.rms_norm_eps)
    assert found.max_position_embeddings == theirs.max_position_embeddings
    assert found.tied_embeddings == theirs.tie_word_embeddings
    assert found.sliding_window == getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None)
    if found.sliding_layers and kinds:
        assert ["sliding_attention" if slides else "full_attention" for slides in found.sliding_layers] == kinds
