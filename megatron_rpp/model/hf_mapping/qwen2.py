"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from megatron_rpp.model.hf_mapping.llama import RULES
from megatron_rpp.model.hf_mapping.table import Family, Rule
from megatron_rpp.model.hf_mapping.transforms import QKV

QKV_BIAS = Rule(
    "decoder.layers.{i}.self_attention.linear_qkv.bias",
    tuple(f"model.layers.{{i}}.self_attn.{part}_proj.bias" for part in "qkv"),
    QKV(),
)

QWEN2 = Family(("Qwen2ForCausalLM",), (*RULES, QKV_BIAS))
