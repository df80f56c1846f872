"""Mistral: Llama whose layers may all have a sliding window."""

from dataclasses import replace

from megatron_rpp.model.hf_config import HFConfig, RawConfig, read_dense
from megatron_rpp.model.hf_mapping.llama import RULES
from megatron_rpp.model.hf_mapping.table import Family


def read(raw: RawConfig) -> HFConfig:
    """transformers takes 8 key-value heads and a window of 4096 where config.json is silent."""
    raw.require("hidden_act", "silu", default="silu")
    hf = read_dense(raw, kv_heads=8)
    window = raw.get("sliding_window") if "sliding_window" in raw else 4096
    return replace(hf, sliding_window=window, sliding_layers=(True,) * hf.num_layers if window else ())


MISTRAL = Family(("MistralForCausalLM",), RULES, read)
