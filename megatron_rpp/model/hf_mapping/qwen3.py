"""Qwen3 (dense): Llama with a norm on each query and key head."""

from megatron_rpp.model.hf_mapping.llama import RULES
from megatron_rpp.model.hf_mapping.table import Family, Rule

QK_NORMS = tuple(
    Rule(
        f"decoder.layers.{{i}}.self_attention.{part}_layernorm.weight",
        (f"model.layers.{{i}}.self_attn.{part}_norm.weight",),
    )
    for part in "qk"
)

QWEN3 = Family(("Qwen3ForCausalLM",), (*RULES, *QK_NORMS))
