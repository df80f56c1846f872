"""Rotary frequencies as transformers computes them; Megatron's own know Llama 3.1's constants only."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpp.model.hf_config import HFConfig, Rope


def frequencies(rope: Rope, hf: HFConfig) -> tuple[Tensor, float]:
    """([rotated dims / 2] float32 inverse frequencies, the factor that scaling puts on cosines and sines).

    Takes the place of `RotaryEmbedding.inv_freq`, which Megatron keeps as a plain attribute.
    """
    if rope.scaling is None:
        dim = int(hf.head_dim * rope.fraction)
        return 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)), 1.0
    from transformers import LlamaConfig  # any configuration with these fields
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        head_dim=hf.head_dim,
        max_position_embeddings=hf.max_position_embeddings,
        rope_parameters=dict(rope.scaling),
    )
    inverse, factor = ROPE_INIT_FUNCTIONS[rope.scaling["rope_type"]](config, torch.device("cpu"))
    return inverse.float(), float(factor)


def attention_scale(hf: HFConfig) -> float | None:
    """What scores are multiplied by; None for Megatron's own 1 / sqrt(head_dim).

    yarn multiplies cosines and sines by a factor, which scales queries and keys both; where whole heads
    are rotated that is the square of it on the scores.
    """
    _, factor = frequencies(hf.rope, hf)
    if factor == 1.0:
        return hf.attention_scale
    if hf.rope.fraction != 1.0:
        raise ValueError("yarn scaling of partly rotated heads is not supported")
    return float((hf.attention_scale or hf.head_dim**-0.5) * factor**2)
