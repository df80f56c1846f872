"""Multi-head latent attention: its part of config.json, and its rules, for every family that has it."""

from __future__ import annotations

from dataclasses import replace

from megatron_rpp.model.hf_config import MLA, HFConfig, RawConfig
from megatron_rpp.model.hf_mapping.table import Rule

_MEGATRON = "decoder.layers.{i}.self_attention"
_HF = "model.layers.{i}.self_attn"


def _rule(megatron: str, hf: str) -> Rule:
    return Rule(f"{_MEGATRON}.{megatron}.weight", (f"{_HF}.{hf}.weight",))


MLA_RULES = (
    # Where queries are projected directly, and where through a latent of rank q_lora_rank.
    _rule("linear_q_proj", "q_proj"),
    _rule("linear_q_down_proj", "q_a_proj"),
    _rule("q_layernorm", "q_a_layernorm"),
    Rule(f"{_MEGATRON}.linear_q_up_proj.layer_norm_weight", (f"{_HF}.q_a_layernorm.weight",)),
    _rule("linear_q_up_proj", "q_b_proj"),
    _rule("linear_kv_down_proj", "kv_a_proj_with_mqa"),
    _rule("kv_layernorm", "kv_a_layernorm"),
    Rule(f"{_MEGATRON}.linear_kv_up_proj.layer_norm_weight", (f"{_HF}.kv_a_layernorm.weight",)),
    _rule("linear_kv_up_proj", "kv_b_proj"),
    _rule("linear_proj", "o_proj"),
)


def read_mla(raw: RawConfig, hf: HFConfig) -> HFConfig:
    """`hf` with its latent attention; the defaults are transformers'. A null q_lora_rank means direct queries."""
    raw.require("attention_bias", False, default=False)
    raw.require("rope_interleave", True, default=True)
    raw.require("num_key_value_heads", hf.num_attention_heads, default=hf.num_attention_heads)
    direct = "q_lora_rank" in raw and raw.get("q_lora_rank") is None
    mla = MLA(
        q_lora_rank=None if direct else raw.size("q_lora_rank", 1536),
        kv_lora_rank=raw.size("kv_lora_rank", 512),
        qk_nope_head_dim=raw.size("qk_nope_head_dim", 128),
        qk_rope_head_dim=raw.size("qk_rope_head_dim", 64),
        v_head_dim=raw.size("v_head_dim", 128),
    )
    _check_rope(raw, hf)
    # As in transformers: what rotary frequencies are computed of.
    return replace(hf, mla=mla, num_query_groups=hf.num_attention_heads, head_dim=mla.qk_rope_head_dim)


def _check_rope(raw: RawConfig, hf: HFConfig) -> None:
    """Refuse the scalings that DeepSeek's released code and transformers compute differently, or that Megatron cannot.

    The released code scales cosines and sines by m(mscale) / m(mscale_all_dim), absent ones being 1 and 0, and
    scores by m(mscale_all_dim)^2 once more. transformers 5 takes m(1) where either of the two is absent or 0.
    """
    scaling = hf.rope.scaling
    if scaling is None:
        return
    if scaling["rope_type"] != "yarn":
        raise raw.error(f"rope_type={scaling['rope_type']!r}, which is not supported with MLA; only yarn is")
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if not (mscale and all_dim) and not (mscale in (None, 1) and not all_dim):
        raise raw.error(
            f"mscale={mscale} and mscale_all_dim={all_dim} beside rope_type='yarn', on which DeepSeek's code and "
            "transformers disagree; both must be set, or neither"
        )
    for key in ("attention_factor", "attn_factor", "truncate"):
        if scaling.get(key) not in (None, True):
            raise raw.error(f"{key}={scaling[key]!r} beside rope_type='yarn', which is not supported with MLA")
