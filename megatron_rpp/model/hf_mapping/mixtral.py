"""Mixtral: Mistral whose MLPs are all experts."""

from __future__ import annotations

from dataclasses import replace

from megatron_rpp.model.hf_config import HFConfig, MoE, RawConfig, read_dense, with_window
from megatron_rpp.model.hf_mapping.llama import RULES
from megatron_rpp.model.hf_mapping.moe_reading import checked, num_experts
from megatron_rpp.model.hf_mapping.moe_rules import expert_rules
from megatron_rpp.model.hf_mapping.table import Family

EXPERTS = expert_rules("model.layers.{i}.block_sparse_moe", gate="w1", up="w3", down="w2")


def read(raw: RawConfig) -> HFConfig:
    """intermediate_size is an expert's. Where config.json is silent, transformers takes what is given here."""
    raw.require("hidden_act", "silu", default="silu")
    hf = read_dense(raw, kv_heads=8, rope_theta=1e6)
    moe = MoE(
        num_experts=num_experts(raw),
        top_k=raw.size("num_experts_per_tok", 2),
        ffn_hidden_size=hf.ffn_hidden_size,
        layers=(True,) * hf.num_layers,
    )
    hf = replace(hf, norm_eps=raw.number("rms_norm_eps", 1e-5), moe=moe)
    return checked(with_window(hf, raw, default=None), raw)


MIXTRAL = Family(("MixtralForCausalLM",), (*RULES, *EXPERTS), read)
