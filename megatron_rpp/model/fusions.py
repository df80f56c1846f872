"""Kernels that do several of a layer's steps at once: which of them a model may use."""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron_rpp import device
from megatron_rpp.model.hf_config import HFConfig

_APEX_KERNEL = "fused_weight_gradient_mlp_cuda"  # without it `ColumnParallelLinear` raises, whatever the layer spec


def fusion_settings(hf: HFConfig, layer_spec: str) -> dict[str, Any]:
    """TransformerConfig's fields. layer_spec: `te` or `local`, as `resolve_layer_spec` answers.

    Never on: `masked_softmax_fusion` (Megatron's own attention, which neither spec has), `persist_layer_norm` (apex's
    LayerNorm, not RMSNorm) and `bias_dropout_fusion` (there are neither).
    """
    on_gpu = layer_spec == "te" and device.has_cuda()
    return {
        "gradient_accumulation_fusion": on_gpu and importlib.util.find_spec(_APEX_KERNEL) is not None,
        "bias_activation_fusion": on_gpu and hf.activation == "silu",  # of GELU Megatron takes its own functions only
        "apply_rope_fusion": on_gpu and _can_fuse_rope(hf),
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "persist_layer_norm": False,
    }


def _can_fuse_rope(hf: HFConfig) -> bool:
    """Megatron (0.16) forgets `rotary_interleaved` of packed sequences; its kernel for MLA wants yarn, and is called
    experimental; Transformer Engine's wants contiguous angles, and `TwoRopeSelfAttention` gives a slice."""
    return hf.mla is None and not hf.rope.interleaved and hf.sliding_rope is None
