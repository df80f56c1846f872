"""Multi-head latent attention (MLA): as its spec says, and for the local one right at any tensor-parallel size."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from megatron_rpp.model.layers.norms import RMSNorm

# Keys in a Megatron checkpoint; Transformer Engine has no `input_layernorm` to rename with MLA.
_FUSED_NORM_KEYS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}

_RESOLVED = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")

LATENT_EPSILON = 1e-6  # whatever the model's is, as in DeepSeek's code


class LatentNorm(RMSNorm):
    """The norm of a compressed query or key-value: its epsilon is not the model's.

    Transformer Engine fuses it into the up-projection: see set_latent_epsilon.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__(config, hidden_size, LATENT_EPSILON)


class SpecMLASelfAttention(MLASelfAttention):
    """Megatron's, made of the modules that its layer spec names."""

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """Megatron-Core 0.19 asks here for the modules around the latent norms. Its own answer under `qk_layernorm`
        puts a norm before queries that are projected directly (DeepSeek-V2-Lite), and without it refuses the norms of
        the local spec, which `mla_config` must not announce by that flag."""
        return {name: getattr(submodules, name) for name in _RESOLVED}


class LocalMLASelfAttention(SpecMLASelfAttention):
    """With the right gradient of the rotary key, for the local layer spec.

    All heads share one rotary key, so that each TP rank has a part of its gradient, of its own heads.
    Megatron never sums the parts where the down-projection is a ColumnParallelLinear: it gathers its
    output by `gather_from_tensor_model_parallel_region`, which takes the gradient for whole.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.linear_kv_down_proj, ColumnParallelLinear) and self.config.tensor_model_parallel_size > 1:
            self.linear_kv_down_proj.register_forward_hook(self._gather)

    def _gather(self, module: torch.nn.Module, args: Any, output: tuple[Tensor, None]) -> tuple[Tensor, None]:
        """[S, B, (latent + rotary) / TP] -> [S, B, latent + rotary], or this rank's part of S (sequence parallel).

        Megatron finds it whole and gathers no more, as it does after Transformer Engine's duplicated
        projection; of a part of S it gathers the rotary key, and sums its gradient.
        """
        whole = gather_from_tensor_model_parallel_region(output[0])
        if self.config.sequence_parallel:
            return scatter_to_sequence_parallel_region(whole), None
        latent, rotary = whole.split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
        return torch.cat([latent, _SumGradient.apply(rotary, self.pg_collection.tp)], dim=-1), None


class _SumGradient(torch.autograd.Function):
    """The input; its gradient is the sum of those of the group's ranks.

    Megatron's `copy_to_tensor_model_parallel_region` sums a copy of a gradient that is not contiguous, as
    those of slices are, and returns the gradient unsummed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


def use_spec_mla(layer: TransformerLayerSubmodules) -> None:
    """Have the MLA of Transformer Engine's spec made as the spec says."""
    layer.self_attention.module = SpecMLASelfAttention


def use_local_mla(layer: TransformerLayerSubmodules) -> None:
    """Make `get_gpt_layer_local_spec`'s MLA one that runs anywhere, and that saves what Transformer Engine's does."""
    layer.self_attention.module = LocalMLASelfAttention
    attention = layer.self_attention.submodules
    attention.q_layernorm = attention.kv_layernorm = LatentNorm
    layer.sharded_state_dict_keys_map = {**layer.sharded_state_dict_keys_map, **_FUSED_NORM_KEYS}


def set_latent_epsilon(model: torch.nn.Module) -> None:
    """Give Transformer Engine's fused latent norms their epsilon: `LayerNormLinear` reads `eps` at every forward."""
    for name, module in model.named_modules():
        if name.endswith((".linear_q_up_proj", ".linear_kv_up_proj")) and hasattr(module, "layer_norm_weight"):
            module.eps = LATENT_EPSILON
