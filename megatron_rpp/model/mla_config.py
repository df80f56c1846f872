"""The multi-head latent attention part of Megatron's TransformerConfig."""

from __future__ import annotations

from typing import Any

from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.model.hf_config import HFConfig


def wants_qk_layernorm(hf: HFConfig, layer_spec: str) -> bool:
    """TransformerConfig.qk_layernorm. layer_spec: `te` or `local`, as `resolve_layer_spec` answers.

    Transformer Engine's spec has MLA's latent norms under this flag alone. The local spec has them anyway, and
    must not set it: `_allreduce_non_tensor_model_parallel_grads` would then sum the gradients of every
    `q_layernorm` over the TP ranks, each of which already holds the whole of it.
    """
    return hf.qk_norm or (hf.mla is not None and layer_spec == "te")


def mla_settings(hf: HFConfig, parallel: ParallelConfig, layer_spec: str) -> dict[str, Any]:
    """MLATransformerConfig's own fields; none without MLA. Raises ValueError for a split that Megatron gets wrong."""
    if hf.mla is None:
        return {}
    _check_split(hf, parallel, layer_spec)
    return {
        "multi_latent_attention": True,
        "q_lora_rank": hf.mla.q_lora_rank,
        "kv_lora_rank": hf.mla.kv_lora_rank,
        "qk_head_dim": hf.mla.qk_nope_head_dim,
        "qk_pos_emb_head_dim": hf.mla.qk_rope_head_dim,
        "v_head_dim": hf.mla.v_head_dim,
        **_rope_settings(hf),
    }


def _rope_settings(hf: HFConfig) -> dict[str, Any]:
    """MLA applies rotary embeddings in its own modules, which read these."""
    scaling = hf.rope.scaling
    if scaling is None:
        # Without yarn the factor is 1, so that Megatron's softmax scale is 1 / sqrt(q_head_dim).
        return {"rope_type": "rope", "rotary_base": hf.rope.theta, "rotary_scaling_factor": 1.0}
    assert scaling["rope_type"] == "yarn", "hf_mapping.mla_rules refuses others"
    return {
        "rope_type": "yarn",
        "rotary_base": hf.rope.theta,
        "rotary_scaling_factor": float(scaling["factor"]),
        "original_max_position_embeddings": int(scaling["original_max_position_embeddings"]),
        "beta_fast": float(scaling.get("beta_fast") or 32),
        "beta_slow": float(scaling.get("beta_slow") or 1),
        "mscale": float(scaling.get("mscale") or 1.0),
        "mscale_all_dim": float(scaling.get("mscale_all_dim") or 0.0),
    }


def _check_split(hf: HFConfig, parallel: ParallelConfig, layer_spec: str) -> None:
    """With Transformer Engine the down-projections are copies on each TP rank, and local layers split them.

    The heads share the rotary key: of copies, only sequence parallelism sums the TP ranks' parts of its gradient.
    """
    assert hf.mla is not None
    if layer_spec == "te":
        if parallel.tensor > 1 and not parallel.sequence:
            wanted = f"parallel.tensor={parallel.tensor} needs parallel.sequence=true"
            raise ValueError(f"{wanted}: Megatron splits the latent attention of {hf.architecture} rightly only so")
        return
    for name, size in {
        "q_lora_rank": hf.mla.q_lora_rank or 0,
        "kv_lora_rank + qk_rope_head_dim": hf.mla.kv_lora_rank + hf.mla.qk_rope_head_dim,
    }.items():
        if size % parallel.tensor:
            raise ValueError(f"parallel.tensor={parallel.tensor} must divide {name}={size} with local layers")
