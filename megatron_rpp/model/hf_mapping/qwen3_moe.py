"""Qwen3-MoE: Qwen3 whose MLPs are experts, but for the layers that config.json excepts."""

from __future__ import annotations

from dataclasses import replace

from megatron_rpp.model.hf_config import HFConfig, MoE, RawConfig, read_dense
from megatron_rpp.model.hf_mapping.llama import RULES
from megatron_rpp.model.hf_mapping.moe_reading import checked, num_experts
from megatron_rpp.model.hf_mapping.moe_rules import expert_rules
from megatron_rpp.model.hf_mapping.qwen3 import QK_NORMS
from megatron_rpp.model.hf_mapping.table import Family


def read(raw: RawConfig) -> HFConfig:
    """Every decoder_sparse_step-th layer has experts, unless it is in mlp_only_layers."""
    raw.require("hidden_act", "silu", default="silu")
    raw.require("attention_bias", False, default=False)
    raw.require("use_sliding_window", False, default=False)
    hf = read_dense(raw, kv_heads=4)
    step, dense = raw.size("decoder_sparse_step", 1), raw.get("mlp_only_layers", [])
    moe = MoE(
        num_experts=num_experts(raw),
        top_k=raw.size("num_experts_per_tok", 8),
        ffn_hidden_size=raw.size("moe_intermediate_size", 768),
        layers=tuple((i + 1) % step == 0 and i not in dense for i in range(hf.num_layers)),
        normalize_top_k=bool(raw.get("norm_topk_prob", False)),
    )
    return checked(replace(hf, qk_norm=True, moe=moe), raw)


QWEN3_MOE = Family(("Qwen3MoeForCausalLM",), (*RULES, *QK_NORMS, *expert_rules()), read)
