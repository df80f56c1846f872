"""What the engine needs from a Hugging Face config.json, under our own names. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class HFConfig:
    """The shape of a dense decoder-only model."""

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling_factor: float | None  # of Llama 3.1's scaling; None: not scaled
    sliding_window: int | None  # positions that a token sees, where that is limited
    max_position_embeddings: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool


def read_hf_config(model_path: str) -> HFConfig:
    """Read MODEL/config.json as transformers 4 or 5 wrote it.

    Raises ValueError for what this package does not run: biases other than Qwen2's, rope scaling other than
    Llama 3.1's, Qwen's sliding windows, activations other than SiLU.
    """
    raw = json.loads((Path(model_path) / "config.json").read_text())
    for key in _REQUIRED:
        if key not in raw:
            raise ValueError(f"{model_path}/config.json lacks {key}")
    architecture = (raw.get("architectures") or ["?"])[0]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    _refuse(model_path, "hidden_act", raw.get("hidden_act", "silu"), "silu")
    _refuse(model_path, "use_sliding_window", bool(raw.get("use_sliding_window")), False)
    qkv_bias = architecture == "Qwen2ForCausalLM"
    _refuse(model_path, "attention_bias", bool(raw.get("attention_bias")) and not qkv_bias, False)
    _refuse(model_path, "mlp_bias", bool(raw.get("mlp_bias")), False)
    heads = raw["num_attention_heads"]
    # What transformers assumes where config.json is silent.
    kv_heads = {"LlamaForCausalLM": heads, "MistralForCausalLM": 8}.get(architecture, 32)
    head_dim = 128 if architecture == "Qwen3ForCausalLM" else None
    return HFConfig(
        architecture=architecture,
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        ffn_hidden_size=raw["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=raw.get("num_key_value_heads", kv_heads) or heads,
        head_dim=raw.get("head_dim", head_dim) or raw["hidden_size"] // heads,
        vocab_size=raw["vocab_size"],
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
        rope_scaling_factor=_rope_scaling_factor(model_path, rope),
        sliding_window=raw.get("sliding_window", 4096) if architecture == "MistralForCausalLM" else None,
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        qk_norm=architecture == "Qwen3ForCausalLM",
    )


def _rope_scaling_factor(model_path: str, rope: dict[str, Any]) -> float | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    _refuse(model_path, "rope type", kind, "llama3")
    # Megatron's RotaryEmbedding takes the factor alone; the rest is Llama 3.1's in its code.
    for key, value in (("low_freq_factor", 1), ("high_freq_factor", 4), ("original_max_position_embeddings", 8192)):
        _refuse(model_path, f"rope {key}", rope.get(key), value)
    return float(rope["factor"])


def _refuse(model_path: str, what: str, value: object, supported: object) -> None:
    if value != supported:
        raise ValueError(f"{model_path}/config.json: {what}={value!r} is not supported; only {supported!r} is")
