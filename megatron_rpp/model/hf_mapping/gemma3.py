"""Gemma 3, text only: Gemma 2 with head norms for soft caps, and another rotary base in sliding layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_rpp.model.hf_config import HFConfig, RawConfig, Rope, rope_from
from megatron_rpp.model.hf_mapping.gemma2 import RULES, read_cap, read_gemma
from megatron_rpp.model.hf_mapping.qwen3 import QK_NORMS
from megatron_rpp.model.hf_mapping.table import Family, with_rules


def read(raw: RawConfig) -> HFConfig:
    """Each sixth layer has full attention where neither layer_types nor sliding_window_pattern says otherwise."""
    raw.require("attn_logit_softcapping", None, default=None)  # transformers reads it but does not apply it
    hf = read_gemma(raw, positions=131_072, every=raw.size("sliding_window_pattern", 6))
    values = _rope_values(raw)
    return replace(
        hf,
        qk_norm=True,
        logits_softcap=read_cap(raw, "final_logit_softcapping", None),
        rope=_rope(raw, values["full_attention"]),
        sliding_rope=_rope(raw, values["sliding_attention"]),
    )


def _rope_values(raw: RawConfig) -> dict[str, dict[str, Any]]:
    """Per kind of layer, as transformers 5 writes them; transformers 4 scales the layers with full attention only."""
    stated = raw.mapping("rope_parameters")
    if stated.keys() - {"full_attention", "sliding_attention"}:
        raise raw.error(f"rope_parameters={dict(stated)}; it must be of full_attention and sliding_attention apart")
    theta = {
        "full_attention": raw.number("rope_theta", 1_000_000.0),
        "sliding_attention": raw.number("rope_local_base_freq", 10_000.0),
    }
    scaling = {"full_attention": raw.mapping("rope_scaling")}
    return {kind: {"rope_theta": theta[kind], **(stated.get(kind) or {}), **scaling.get(kind, {})} for kind in theta}


def _rope(raw: RawConfig, values: dict[str, Any]) -> Rope:
    rope = rope_from(raw, {"partial_rotary_factor": 1.0, **values})
    if rope.scaling is not None and rope.scaling["rope_type"] == "yarn":
        # Its factor on cosines and sines becomes one on all scores (rotary.attention_scale): of both kinds of layer.
        raise raw.error("rope_type='yarn', which is not supported for Gemma 3; only default, linear and llama3 are")
    return rope


GEMMA3 = Family(("Gemma3ForCausalLM",), with_rules(RULES, *QK_NORMS), read)
