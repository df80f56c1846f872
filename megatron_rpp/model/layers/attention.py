"""Core attention for the local layer spec, on torch's scaled_dot_product_attention; for soft caps in both specs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_rpp.model.layers.capped_attention import capped_attention
from megatron_rpp.model.layers.packed_attention import SlotParams, packed_attention

_BLOCK = 1024  # query positions that have a mask at once


class SDPACoreAttention(torch.nn.Module):
    """Causal attention over sequences that are padded on the right, or packed.

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
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        """`softcap`: scores become softcap * tanh(score / softcap). Windows are in `config`, for both specs."""
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal
        self.softmax_scale, self.softcap = softmax_scale, softcap
        self.cp_group = pg_collection.cp if pg_collection is not None and config.context_parallel_size > 1 else None
        assert config.context_parallel_size == 1 or self.cp_group is not None
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
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [S, B, heads, D]; key and value [S, B, groups, D] -> [S, B, heads * D].

        Packed, on each CP rank: query [T / cp_size, heads, D] and so on -> [T / cp_size, heads * D].
        """
        assert attention_bias is None
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, SlotParams), "slot_params makes them"
            return packed_attention(query, key, value, packed_seq_params.bounds, self.cp_group, self._attend)
        assert self.cp_group is None, "only packed sequences are shared out over CP ranks"
        # SDPA wants [B, heads, S, D].
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return self._attend(q, k, v).permute(2, 0, 1, 3).flatten(start_dim=2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, heads, C, D] at the last C of K keys; k and v [B, groups, K, D] -> [B, heads, C, D]."""
        if self.softcap is not None:
            scale = q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
            return capped_attention(q, k, v, cap=self.softcap, scale=scale, window=self.window)
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        length = k.shape[2]
        if q.shape[2] == length and (self.window is None or self.window >= length):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
        return torch.cat([self._block(q, k, v, start) for start in range(0, q.shape[2], _BLOCK)], dim=2)

    def _block(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """What `_attend` gives for a block of queries from `start` on, with the keys that they see alone."""
        before = k.shape[2] - q.shape[2]  # is_causal would put the first query at the first key
        end = min(start + _BLOCK, q.shape[2])
        first = 0 if self.window is None else max(0, before + start - self.window + 1)
        seen = slice(first, before + end)
        mask = _mask(end - start, before + end - first, self.window, q.device)
        return F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, seen], v[:, :, seen], mask,
                                              scale=self.softmax_scale)  # fmt: skip


@lru_cache(maxsize=8)  # they serve all layers of a microbatch
def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool: True where the query of a row, at the last keys, sees the key of a column."""
    before = keys - queries
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(before)
    return mask if window is None else mask.triu(before + 1 - window)
