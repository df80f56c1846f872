"""What some families change in a transformer layer, put into the layer spec of either kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.layers.attention import SDPACoreAttention
from megatron_rpp.model.layers.norms import NormThenAdd
from megatron_rpp.model.layers.router import use_group_router

# Keys in a Megatron checkpoint, under the names that Megatron-Bridge gives them.
_POST_NORM_KEYS = {
    "self_attn_bda.norm.": "self_attention.linear_proj.post_layernorm.",
    "mlp_bda.norm.": "mlp.linear_fc2.post_layernorm.",
}


def add_features(
    spec: ModuleSpec, hf: HFConfig, config: TransformerConfig, norm: Callable[..., torch.nn.Module]
) -> None:
    """Change the layer `spec` in place; a second time changes nothing. `norm` is the class of its norms."""
    layer = spec.submodules
    # Transformer Engine's attention has no soft cap, and of packed sequences on several CP ranks no window.
    if hf.attention_softcap is not None or (hf.sliding_window and config.context_parallel_size > 1):
        params = {"softcap": hf.attention_softcap}
        layer.self_attention.submodules.core_attention = ModuleSpec(module=SDPACoreAttention, params=params)
    if hf.sliding_rope is not None:
        layer.self_attention.module = TwoRopeSelfAttention
    use_group_router(layer.mlp, hf.moe)
    if hf.post_norms:
        layer.self_attn_bda = layer.mlp_bda = ModuleSpec(module=NormThenAdd, params={"config": config, "norm": norm})
        layer.sharded_state_dict_keys_map = {**layer.sharded_state_dict_keys_map, **_POST_NORM_KEYS}


class TwoRopeSelfAttention(SelfAttention):
    """Takes its layer's half of the angles that `rotary.TwoRotaryEmbeddings` gives to all layers."""

    def forward(
        self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """rotary_pos_emb [S, 2, 1, rotated dims]: of layers with full attention, then of sliding ones."""
        window, sliding_layers = self.config.window_size, self.config.window_attn_skip_freq
        # layer_number counts from 1 over all stages, virtual ones included.
        kind = int(is_layer_window_attention(window, sliding_layers, self.layer_number))
        own = rotary_pos_emb[:, kind : kind + 1]
        output: tuple[Tensor, Tensor | None] = super().forward(hidden_states, *args, rotary_pos_emb=own, **kwargs)
        return output
