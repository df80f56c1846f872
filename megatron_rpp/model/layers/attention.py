"""Core attention for the local layer spec, on torch's scaled_dot_product_attention; for soft caps in both specs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_rpp.model.layers.capped_attention import capped_attention


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
        softcap: float | None = None,
        **unused: Any,
    ) -> None:
        """`softcap`: scores become softcap * tanh(score / softcap). Windows are in `config`, for both specs."""
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal and config.context_parallel_size == 1
        self.softmax_scale, self.softcap = softmax_scale, softcap
        slides = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        # Megatron's window is (positions before a token, positions behind it).
        self.window = config.window_size[0] + 1 if slides and config.window_size else None

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
        out = self._capped(q, k, v) if self.softcap is not None else self._plain(q, k, v)
        return out.permute(2, 0, 1, 3).flatten(start_dim=2)

    def _capped(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.softcap is not None
        scale = q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        return capped_attention(q, k, v, cap=self.softcap, scale=scale, window=self.window)

    def _plain(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        length = q.shape[2]
        mask = None if self.window is None or self.window >= length else _window_mask(length, self.window, q.device)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=self.softmax_scale)


@lru_cache(maxsize=1)  # it serves all layers of a microbatch, and stays until one of another length comes
def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """[S, S] bool: True where the query of a row sees the key of a column."""
    everything = torch.ones(length, length, dtype=torch.bool, device=device)
    return everything.tril().triu(1 - window)
