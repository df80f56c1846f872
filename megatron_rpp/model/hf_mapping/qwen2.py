"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from dataclasses import replace

from megatron_rpp.model.hf_config import HFConfig, RawConfig, read_dense
from megatron_rpp.model.hf_mapping.llama import RULES
from megatron_rpp.model.hf_mapping.table import Family, Rule
from megatron_rpp.model.hf_mapping.transforms import QKV

QKV_BIAS = Rule(
    "decoder.layers.{i}.self_attention.linear_qkv.bias",
    tuple(f"model.layers.{{i}}.self_attn.{part}_proj.bias" for part in "qkv"),
    QKV(),
)


def read(raw: RawConfig) -> HFConfig:
    """q, k and v always have a bias; `attention_bias` is not read."""
    raw.require("hidden_act", "silu", default="silu")
    raw.require("use_sliding_window", False, default=False)
    return replace(read_dense(raw, kv_heads=32), qkv_bias=True)


QWEN2 = Family(("Qwen2ForCausalLM",), (*RULES, QKV_BIAS), read)
