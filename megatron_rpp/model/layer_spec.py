"""Which modules a transformer layer is made of: Transformer Engine's, or local ones that run anywhere."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rpp import device
from megatron_rpp.model.attention import SDPACoreAttention


def resolve_layer_spec(choice: str) -> str:
    """`te` or `local` for the config's `auto | te | local`. ValueError where `te` cannot run."""
    can_run_te = device.has_cuda() and importlib.util.find_spec("transformer_engine") is not None
    if choice == "te" and not can_run_te:
        raise ValueError("model.layer_spec=te needs CUDA and transformer-engine; use auto or local")
    if choice == "auto":
        return "te" if can_run_te else "local"
    return choice


def block_spec(config: TransformerConfig, layer_spec: str, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The spec of the decoder layers that this rank (and virtual stage) holds, with its final norm."""
    if layer_spec == "te":
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    layers = [_local_layer(config)] * get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _local_layer(config: TransformerConfig) -> ModuleSpec:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm that allows sequence parallelism, which Megatron's `WrappedTorchNorm` refuses."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device.current()))
        # finalize_model_grads sums the gradients of parameters so marked over the TP ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalize over the last dimension; any shape [..., hidden_size]."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
