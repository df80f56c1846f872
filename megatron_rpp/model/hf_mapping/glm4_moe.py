"""GLM-4.5: grouped-query attention with half of each head rotated, and DeepSeek-V3's experts."""

from __future__ import annotations

from dataclasses import replace

from megatron_rpp.model.hf_config import HFConfig, RawConfig, read_dense
from megatron_rpp.model.hf_mapping.deepseek_v3 import MOE_RULES, read_moe
from megatron_rpp.model.hf_mapping.llama import RULES
from megatron_rpp.model.hf_mapping.moe_reading import checked
from megatron_rpp.model.hf_mapping.qwen2 import QKV_BIAS
from megatron_rpp.model.hf_mapping.qwen3 import QK_NORMS
from megatron_rpp.model.hf_mapping.table import Family, with_rules


def read(raw: RawConfig) -> HFConfig:
    """The defaults are transformers'. Unlike dense GLM-4, it rotates halves of a head, not neighbours."""
    raw.require("hidden_act", "silu", default="silu")
    hf = replace(
        read_dense(raw, kv_heads=8, rope_fraction=0.5),
        norm_eps=raw.number("rms_norm_eps", 1e-5),
        max_position_embeddings=raw.size("max_position_embeddings", 131_072),
        qkv_bias=bool(raw.get("attention_bias", False)),
        qk_norm=bool(raw.get("use_qk_norm", False)),
        num_mtp_layers=raw.count("num_nextn_predict_layers", 1),
    )
    moe = read_moe(raw, hf, top_k=8, groups=(1, 1), expert=1408, dense=1, scale=1.0)
    return checked(replace(hf, moe=moe), raw)


GLM4_MOE = Family(("Glm4MoeForCausalLM",), with_rules(RULES, QKV_BIAS, *QK_NORMS, *MOE_RULES), read)
