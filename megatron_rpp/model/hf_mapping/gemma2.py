"""Gemma 2: zero-centred norms on both sides of attention and MLP, soft caps, every other layer sliding."""

from __future__ import annotations

from dataclasses import replace

from megatron_rpp.model.hf_config import HFConfig, RawConfig, read_dense
from megatron_rpp.model.hf_mapping.llama import RULES as LLAMA_RULES
from megatron_rpp.model.hf_mapping.table import Family, Rule, with_rules

_LAYER, _HF = "decoder.layers.{i}", "model.layers.{i}"

RULES = with_rules(
    LLAMA_RULES,
    Rule(f"{_LAYER}.self_attn_bda.norm.weight", (f"{_HF}.post_attention_layernorm.weight",)),
    Rule(f"{_LAYER}.pre_mlp_layernorm.weight", (f"{_HF}.pre_feedforward_layernorm.weight",)),
    Rule(f"{_LAYER}.mlp.linear_fc1.layer_norm_weight", (f"{_HF}.pre_feedforward_layernorm.weight",)),
    Rule(f"{_LAYER}.mlp_bda.norm.weight", (f"{_HF}.post_feedforward_layernorm.weight",)),
)


def read(raw: RawConfig) -> HFConfig:
    """The defaults are transformers': google/gemma-2 leaves out tie_word_embeddings and layer_types."""
    return replace(
        read_gemma(raw, positions=8192, every=2),
        attention_softcap=read_cap(raw, "attn_logit_softcapping", 50.0),
        logits_softcap=read_cap(raw, "final_logit_softcapping", 30.0),
    )


def read_gemma(raw: RawConfig, *, positions: int, every: int) -> HFConfig:
    """What Gemma 2 and 3 share. Without layer_types, each layer slides but for each `every`-th."""
    raw.require("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    raw.require("attention_bias", False, default=False)
    raw.require("use_bidirectional_attention", False, default=False)
    hf = read_dense(raw, kv_heads=4, head_dim=256)
    return replace(
        hf,
        max_position_embeddings=raw.size("max_position_embeddings", positions),
        tied_embeddings=bool(raw.get("tie_word_embeddings", True)),
        activation="gelu_tanh",
        zero_centered_norm=True,
        post_norms=True,
        embedding_scale=hf.hidden_size**0.5,
        attention_scale=raw.size("query_pre_attn_scalar", 256) ** -0.5,
        sliding_window=raw.size("sliding_window", 4096),
        sliding_layers=_sliding_layers(raw, hf.num_layers, every),
    )


def _sliding_layers(raw: RawConfig, num_layers: int, every: int) -> tuple[bool, ...]:
    kinds = raw.get("layer_types")
    if kinds is None:
        return tuple((i + 1) % every != 0 for i in range(num_layers))
    if len(kinds) != num_layers or not {*kinds} <= {"sliding_attention", "full_attention"}:
        raise raw.error(
            f"layer_types={kinds}; it must name sliding_attention or full_attention for {num_layers} layers"
        )
    return tuple(kind == "sliding_attention" for kind in kinds)


def read_cap(raw: RawConfig, key: str, default: float | None) -> float | None:
    """A null means no cap; an absent key means `default`."""
    cap = raw.get(key) if key in raw else default
    if cap is not None and not (isinstance(cap, int | float) and cap > 0):
        raise raw.error(f"{key}={cap!r}; it must be a positive number, or null for no cap")
    return cap


GEMMA2 = Family(("Gemma2ForCausalLM",), RULES, read)
