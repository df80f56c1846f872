"""The mixture-of-experts part of Megatron's TransformerConfig."""

from __future__ import annotations

from typing import Any

from megatron_rpp import device
from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.model.hf_config import HFConfig, MoE


def moe_settings(hf: HFConfig, parallel: ParallelConfig, layer_spec: str) -> dict[str, Any]:
    """TransformerConfig's fields for the experts of `hf`; none where it has no experts.

    layer_spec: `te` or `local`, as `resolve_layer_spec` answers.
    """
    if hf.moe is None:
        return {}
    moe = hf.moe
    return {
        "num_moe_experts": moe.num_experts,
        # A list makes Megatron's checkpoints name each layer, so it is for layers that do differ.
        "moe_layer_freq": 1 if all(moe.layers) else [int(has_experts) for has_experts in moe.layers],
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size or None,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        # No balancing: its auxiliary losses would escape engine/loss_scale.py.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        # The all-to-all dispatcher wants CUDA streams; gloo has no all-to-all of unequal splits.
        "moe_token_dispatcher_type": "alltoall" if device.has_cuda() else "allgather",
        "moe_grouped_gemm": layer_spec == "te",
        **_router_settings(moe),
    }


def _router_settings(moe: MoE) -> dict[str, Any]:
    grouped = moe.top_groups < moe.num_groups
    return {
        "moe_router_topk": moe.top_k,
        "moe_router_dtype": "fp32",
        "moe_router_score_function": moe.score,
        # Softmax over the chosen logits alone is softmax over all, normalized to the chosen ones.
        "moe_router_pre_softmax": moe.score == "softmax" and not moe.normalize_top_k,
        "moe_router_topk_scaling_factor": None if moe.scale == 1.0 else moe.scale,
        "moe_router_num_groups": moe.num_groups if grouped else None,
        "moe_router_group_topk": moe.top_groups if grouped else None,
        "moe_router_enable_expert_bias": moe.selection_bias,
        "moe_router_bias_update_rate": 0.0,  # frozen: `finalize_model_grads` moves it by the load of experts otherwise
    }
