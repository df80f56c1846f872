"""DeepSeek-V2: latent attention, and experts chosen by softmax, in DeepSeek's largest from the best groups alone."""

from __future__ import annotations

from dataclasses import replace

from megatron_rpp.model.hf_config import HFConfig, MoE, RawConfig
from megatron_rpp.model.hf_mapping import llama
from megatron_rpp.model.hf_mapping.mla_rules import MLA_RULES, read_mla
from megatron_rpp.model.hf_mapping.moe_reading import checked, num_experts, num_shared_experts
from megatron_rpp.model.hf_mapping.moe_rules import SHARED_EXPERTS, expert_rules
from megatron_rpp.model.hf_mapping.table import Family, with_rules

RULES = with_rules(llama.RULES, *MLA_RULES, *expert_rules(), *SHARED_EXPERTS)


def read(raw: RawConfig) -> HFConfig:
    """norm_topk_prob must be off: DeepSeek's code then normalizes and does not scale, transformers ignores it."""
    raw.require("norm_topk_prob", False, default=False)
    raw.require("scoring_func", "softmax", default="softmax")
    raw.require("moe_layer_freq", 1, default=1)
    hf = read_mla(raw, llama.read(raw))
    expert, dense = raw.size("moe_intermediate_size", 1407), raw.count("first_k_dense_replace", 0)
    moe = MoE(
        num_experts=num_experts(raw),
        top_k=raw.size("num_experts_per_tok"),
        ffn_hidden_size=expert,
        layers=tuple(i >= dense for i in range(hf.num_layers)),
        normalize_top_k=False,
        scale=raw.number("routed_scaling_factor", 1.0),
        shared_ffn_hidden_size=expert * num_shared_experts(raw, 2),
    )
    method = raw.get("topk_method", "greedy")
    if method == "group_limited_greedy":
        groups, chosen = raw.size("n_group"), raw.size("topk_group")
        moe = replace(moe, num_groups=groups, top_groups=chosen, group_score="max")
    elif method != "greedy":
        raise raw.error(f"topk_method={method!r}; it must be greedy or group_limited_greedy")
    return checked(replace(hf, moe=moe), raw)


DEEPSEEK_V2 = Family(("DeepseekV2ForCausalLM",), RULES, read)
