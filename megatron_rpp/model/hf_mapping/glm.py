"""GLM-4 (dense): Llama with half of each head rotated in neighbouring pairs, gate and up as one tensor.

Glm4ForCausalLM (GLM-4-0414) also has norms behind attention and MLP.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_rpp.model.hf_config import HFConfig, RawConfig, read_dense
from megatron_rpp.model.hf_mapping.llama import RULES as LLAMA_RULES
from megatron_rpp.model.hf_mapping.qwen2 import QKV_BIAS
from megatron_rpp.model.hf_mapping.table import Family, Rule, with_rules
from megatron_rpp.model.hf_mapping.transforms import MergedGateUp

_LAYER, _HF = "decoder.layers.{i}", "model.layers.{i}"

GLM_RULES = with_rules(
    LLAMA_RULES,
    QKV_BIAS,
    Rule(f"{_LAYER}.mlp.linear_fc1.weight", (f"{_HF}.mlp.gate_up_proj.weight",), MergedGateUp()),
)
GLM4_RULES = with_rules(
    GLM_RULES,
    Rule(f"{_LAYER}.self_attn_bda.norm.weight", (f"{_HF}.post_self_attn_layernorm.weight",)),
    Rule(f"{_LAYER}.mlp_bda.norm.weight", (f"{_HF}.post_mlp_layernorm.weight",)),
)


def read(raw: RawConfig) -> HFConfig:
    """The defaults are transformers'."""
    raw.require("hidden_act", "silu", default="silu")
    hf = read_dense(raw, kv_heads=2, head_dim=128, rope_fraction=0.5)
    return replace(
        hf,
        norm_eps=raw.number("rms_norm_eps", 1.5625e-07),
        rope=replace(hf.rope, interleaved=True),
        max_position_embeddings=raw.size("max_position_embeddings", 131_072),
        qkv_bias=bool(raw.get("attention_bias", True)),
        post_norms=raw.architecture == "Glm4ForCausalLM",
    )


GLM = Family(("GlmForCausalLM",), GLM_RULES, read)
GLM4 = Family(("Glm4ForCausalLM",), GLM4_RULES, read)
