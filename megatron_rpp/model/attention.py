"""Core attention for the local layer spec, on torch's scaled_dot_product_attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SDPACoreAttention(torch.nn.Module):
    """Causal attention over sequences that are padded on the right.

    Takes the place of Megatron's `DotProductAttention` in the layer spec and needs no mask tensor: with
    causal attention, padding on the right is never seen by a real token.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal and config.context_parallel_size == 1
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [S, B, heads, D]; key and value [S, B, groups, D] -> [S, B, heads * D]."""
        assert attention_bias is None and packed_seq_params is None
        # SDPA wants [B, heads, S, D].
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(start_dim=2)
