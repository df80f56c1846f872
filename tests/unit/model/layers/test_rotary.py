"""Rotary frequencies and factors of every kind of scaling are those of transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, GlmConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.model.layers.rotary import TwoRotaryEmbeddings, attention_scale, frequencies

SHAPE = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn_with_its_own_factor": {"rope_type": "yarn", **YARN, "attention_factor": 0.9},
    "yarn_of_deepseek": {"rope_type": "yarn", **YARN, "beta_fast": 20.0, "mscale": 1.0, "mscale_all_dim": 0.5},
}


def read(config: Any, architecture: str, folder: Path) -> HFConfig:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return read_hf_config(str(folder))


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("head_dim", [24, 32])
def test_frequencies_and_factor_are_those_of_transformers(kind: str, head_dim: int, tmp_path: Path) -> None:
    config = LlamaConfig(**SHAPE, head_dim=head_dim, rope_parameters={"rope_theta": 5e5, **ROPES[kind]})
    theirs = LlamaRotaryEmbedding(config)
    inverse, factor = frequencies(read(config, "LlamaForCausalLM", tmp_path).rope, hf := read_hf_config(str(tmp_path)))
    assert torch.equal(inverse, theirs.inv_freq) and factor == theirs.attention_scaling
    assert (factor != 1.0) == kind.startswith("yarn"), "the case would prove nothing"
    scale = attention_scale(hf)
    assert (scale or head_dim**-0.5) == pytest.approx(head_dim**-0.5 * theirs.attention_scaling**2)


@pytest.mark.parametrize("kind", ["default", "linear"])
def test_partly_rotated_heads_have_frequencies_for_the_rotated_part_only(kind: str, tmp_path: Path) -> None:
    config = GlmConfig(**SHAPE, head_dim=24, rope_parameters={"rope_theta": 5e5, **ROPES[kind]})
    theirs = GlmRotaryEmbedding(config)
    hf = read(config, "GlmForCausalLM", tmp_path)
    assert torch.equal(frequencies(hf.rope, hf)[0], theirs.inv_freq)
    assert theirs.inv_freq.shape == (6,)


def test_yarns_attn_factor_is_applied_as_sglang_does(tmp_path: Path) -> None:
    """transformers does not read it: the trainer would sample from one model and train another."""
    config = LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 5e5, **ROPES["yarn"]})
    hf = read(config, "LlamaForCausalLM", tmp_path)
    assert hf.rope.scaling is not None
    scaled = replace(hf, rope=replace(hf.rope, scaling={**hf.rope.scaling, "attn_factor": 0.5}))
    plain = attention_scale(hf)
    assert plain is not None and attention_scale(scaled) == pytest.approx(plain * 0.25)


def test_gemma3_gives_layers_with_full_attention_and_sliding_ones_their_own_angles(tmp_path: Path) -> None:
    ropes = {
        "full_attention": {"rope_theta": 1e6, **ROPES["linear"]},
        "sliding_attention": {"rope_theta": 1e4, **ROPES["default"]},
    }
    config = Gemma3TextConfig(**SHAPE, head_dim=24, rope_parameters=ropes, tie_word_embeddings=True)
    hf = read(config, "Gemma3ForCausalLM", tmp_path)
    assert hf.sliding_rope is not None
    angles = TwoRotaryEmbeddings(frequencies(hf.rope, hf)[0], frequencies(hf.sliding_rope, hf)[0], hf).get_emb(9)
    assert angles.shape == (9, 2, 1, 24)
    theirs = Gemma3RotaryEmbedding(config)
    for kind, name in enumerate(ropes):
        cosines, _ = theirs(torch.zeros(1, dtype=torch.float32), torch.arange(9)[None], name)
        torch.testing.assert_close(angles[:, kind, 0].cos(), cosines[0], atol=0, rtol=0)
