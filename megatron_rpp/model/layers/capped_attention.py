"""Causal attention with soft-capped scores, which neither torch's SDPA nor Megatron's Transformer Engine layer has.

Shapes: B sequences, S queries, K keys, H query heads in G groups of R, D dimensions a head, C rows of a chunk.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK = 256  # query positions whose scores exist at once


def capped_attention(q: Tensor, k: Tensor, v: Tensor, *, cap: float, scale: float, window: int | None) -> Tensor:
    """q [B, H, S, D], k [B, G, K, D] and v [B, G, K, Dv] -> [B, H, S, Dv]; the queries stand at the last S keys.

    Each position sees itself and what is before it, of a `window` the nearest ones only. Scores are
    computed and capped in float32, a chunk of queries at a time, and computed again in the backward:
    all of them at once would take 4 H S K bytes a sequence and layer.
    """
    length, groups, before = q.shape[2], k.shape[1], k.shape[2] - q.shape[2]
    grouped = q.unflatten(1, (groups, -1))  # [B, G, R, S, D]
    outputs = []
    for start in range(0, length, _CHUNK):
        end = min(start + _CHUNK, length)
        first = 0 if window is None else max(0, before + start - window + 1)
        attend = partial(_attend, cap=cap, scale=scale, window=window, offset=before + start - first)
        seen = slice(first, before + end)
        chunk = grouped[:, :, :, start:end], k[:, :, seen], v[:, :, seen]
        recompute = torch.is_grad_enabled() and length > _CHUNK
        outputs.append(
            checkpoint(attend, *chunk, use_reentrant=False, preserve_rng_state=False) if recompute else attend(*chunk)
        )
    return torch.cat(outputs, dim=3).flatten(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, cap: float, scale: float, window: int | None, offset: int) -> Tensor:
    """q [B, G, R, C, D], k [B, G, K, D], v [B, G, K, Dv] -> [B, G, R, C, Dv]; the first query is at key `offset`."""
    rows = q.shape[2:4]  # R and C, as one dimension in the products: no copies of keys for each head of a group
    scores = (q.flatten(2, 3).float() @ k.float().mT).unflatten(2, rows)
    scores = cap * torch.tanh(scores * (scale / cap))
    behind = torch.arange(rows[1], device=q.device)[:, None] + offset - torch.arange(k.shape[2], device=q.device)
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1).to(v.dtype)
    return (weights.flatten(2, 3) @ v).unflatten(2, rows)
