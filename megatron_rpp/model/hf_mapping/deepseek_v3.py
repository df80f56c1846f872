"""DeepSeek-V3: latent attention, and experts chosen by sigmoid scores that a bias balances."""

from __future__ import annotations

from dataclasses import replace

from megatron_rpp.model.hf_config import HFConfig, MoE, RawConfig
from megatron_rpp.model.hf_mapping import llama
from megatron_rpp.model.hf_mapping.mla_rules import MLA_RULES, read_mla
from megatron_rpp.model.hf_mapping.moe_reading import checked, num_experts, num_shared_experts
from megatron_rpp.model.hf_mapping.moe_rules import SELECTION_BIAS, SHARED_EXPERTS, expert_rules
from megatron_rpp.model.hf_mapping.table import Family, with_rules

MOE_RULES = (*expert_rules(), SELECTION_BIAS, *SHARED_EXPERTS)


def read(raw: RawConfig) -> HFConfig:
    """The defaults are transformers'."""
    hf = replace(read_mla(raw, llama.read(raw)), max_position_embeddings=raw.size("max_position_embeddings", 4096))
    moe = read_moe(raw, hf, top_k=8, groups=(8, 4), expert=2048, dense=3, scale=2.5)
    return checked(replace(hf, moe=moe, num_mtp_layers=raw.count("num_nextn_predict_layers", 1)), raw)


def read_moe(
    raw: RawConfig, hf: HFConfig, *, top_k: int, groups: tuple[int, int], expert: int, dense: int, scale: float
) -> MoE:
    """What GLM-4.5 shares; the keywords are transformers' defaults. `dense` layers come before those with experts."""
    raw.require("scoring_func", "sigmoid", default="sigmoid")
    raw.require("topk_method", "noaux_tc", default="noaux_tc")
    raw.require("moe_layer_freq", 1, default=1)
    width, first = raw.size("moe_intermediate_size", expert), raw.count("first_k_dense_replace", dense)
    return MoE(
        num_experts=num_experts(raw),
        top_k=raw.size("num_experts_per_tok", top_k),
        ffn_hidden_size=width,
        layers=tuple(i >= first for i in range(hf.num_layers)),
        score="sigmoid",
        normalize_top_k=bool(raw.get("norm_topk_prob", True)),
        scale=raw.number("routed_scaling_factor", scale),
        num_groups=raw.size("n_group", groups[0]),
        top_groups=raw.size("topk_group", groups[1]),
        group_score="top2_sum",
        selection_bias=True,
        shared_ffn_hidden_size=width * num_shared_experts(raw, 1),
    )


DEEPSEEK_V3 = Family(("DeepseekV3ForCausalLM",), with_rules(llama.RULES, *MLA_RULES, *MOE_RULES), read)
