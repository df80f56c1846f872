"""What a sequence costs a model: floating-point operations, to share work out evenly."""

from __future__ import annotations

from megatron_rpp.experience.balance import SequenceCost
from megatron_rpp.model.hf_config import HFConfig


def sequence_cost(hf: HFConfig) -> SequenceCost:
    """Of one forward pass; a backward is twice that in every term, so that proportions stay.

    Counted are matrix products: two operations for each weight that a token meets (of experts, only those that it
    is sent to), and for each pair of positions that causal attention looks at, q . k and the weighted sum of v.
    """
    sliding = sum(hf.sliding_layers)
    pair = _head_width(hf) * hf.num_attention_heads  # x 2 operations, x tokens^2 / 2 pairs
    return SequenceCost(
        linear=2.0 * _active_weights(hf),
        quadratic=float((hf.num_layers - sliding) * pair),
        sliding=float(sliding * pair),
        window=hf.sliding_window or 0,
    )


def _head_width(hf: HFConfig) -> int:
    """Dimensions of a head's q . k, and of its v."""
    mla = hf.mla
    return 2 * hf.head_dim if mla is None else mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim


def _active_weights(hf: HFConfig) -> int:
    """Of matrices, that one token meets; the embedding is looked up."""
    experts = sum(hf.moe.layers) if hf.moe else 0
    dense = 3 * hf.hidden_size * hf.ffn_hidden_size
    in_layers = hf.num_layers * _attention_weights(hf) + (hf.num_layers - experts) * dense + experts * _of_experts(hf)
    return in_layers + hf.hidden_size * hf.vocab_size


def _attention_weights(hf: HFConfig) -> int:
    hidden, heads, mla = hf.hidden_size, hf.num_attention_heads, hf.mla
    if mla is None:
        return 2 * hidden * hf.head_dim * (heads + hf.num_query_groups)
    query = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    down = mla.kv_lora_rank + mla.qk_rope_head_dim + (mla.q_lora_rank or 0)
    up = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim) + (mla.q_lora_rank or hidden) * query
    return hidden * down + up + heads * mla.v_head_dim * hidden


def _of_experts(hf: HFConfig) -> int:
    """Of a layer with experts: the router, those that a token is sent to, and the shared one."""
    moe = hf.moe
    if moe is None:
        return 0
    widths = moe.num_experts + 3 * (moe.top_k * moe.ffn_hidden_size + moe.shared_ffn_hidden_size)
    return hf.hidden_size * widths
