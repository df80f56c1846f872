"""Qwen3 (dense): Llama with a norm on each query and key head."""

from dataclasses import replace

from megatron_rpp.model.hf_config import HFConfig, RawConfig, read_dense
from megatron_rpp.model.hf_mapping.llama import RULES
from megatron_rpp.model.hf_mapping.table import Family, Rule

QK_NORMS = tuple(
    Rule(
        f"decoder.layers.{{i}}.self_attention.{part}_layernorm.weight",
        (f"model.layers.{{i}}.self_attn.{part}_norm.weight",),
    )
    for part in "qk"
)


def read(raw: RawConfig) -> HFConfig:
    """transformers takes heads of 128 where config.json names no head_dim."""
    raw.require("hidden_act", "silu", default="silu")
    raw.require("attention_bias", False, default=False)
    raw.require("use_sliding_window", False, default=False)
    return replace(read_dense(raw, kv_heads=32, head_dim=128), qk_norm=True)


QWEN3 = Family(("Qwen3ForCausalLM",), (*RULES, *QK_NORMS), read)
