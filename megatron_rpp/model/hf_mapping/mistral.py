"""Mistral: Llama whose layers may all have a sliding window."""

from megatron_rpp.model.hf_config import HFConfig, RawConfig, read_dense, with_window
from megatron_rpp.model.hf_mapping.llama import RULES
from megatron_rpp.model.hf_mapping.table import Family


def read(raw: RawConfig) -> HFConfig:
    """transformers takes 8 key-value heads and a window of 4096 where config.json is silent."""
    raw.require("hidden_act", "silu", default="silu")
    return with_window(read_dense(raw, kv_heads=8), raw, default=4096)


MISTRAL = Family(("MistralForCausalLM",), RULES, read)
