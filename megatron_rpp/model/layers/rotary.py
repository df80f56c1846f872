"""Rotary frequencies as transformers computes them; Megatron's own know Llama 3.1's constants only."""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_rpp.model.hf_config import HFConfig, Rope


def install_rotary(model: GPTModel, hf: HFConfig) -> None:
    """Give `model` the frequencies of `hf`, in every layer or in layers with full attention and sliding ones apart."""
    if hf.mla is not None:
        return  # each layer has its own: mla_config.py
    model.rotary_pos_emb.inv_freq, _ = frequencies(hf.rope, hf)
    if hf.sliding_rope is not None:
        sliding, _ = frequencies(hf.sliding_rope, hf)
        model.rotary_pos_emb = TwoRotaryEmbeddings(model.rotary_pos_emb.inv_freq, sliding, hf)


class TwoRotaryEmbeddings(RotaryEmbedding):
    """The angles of layers with full attention and of sliding layers; `TwoRopeSelfAttention` takes its own."""

    def __init__(self, full: Tensor, sliding: Tensor, hf: HFConfig) -> None:
        """`full` and `sliding`: [rotated dims / 2] float32 inverse frequencies."""
        assert hf.sliding_rope is not None and hf.sliding_rope.interleaved == hf.rope.interleaved
        super().__init__(hf.head_dim, hf.rope.fraction, hf.rope.interleaved, use_cpu_initialization=True)
        self.sliding = RotaryEmbedding(
            hf.head_dim, hf.sliding_rope.fraction, hf.rope.interleaved, use_cpu_initialization=True
        )
        self.inv_freq, self.sliding.inv_freq = full, sliding

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """[S, 2, 1, rotated dims]; the base class caches it, and splits its first dimension over CP ranks."""
        both = [super().get_emb(max_seq_len, offset), self.sliding.get_emb(max_seq_len, offset)]
        return torch.cat(both, dim=1)


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
        rope_parameters={key: value for key, value in rope.scaling.items() if key != "attn_factor"},
    )
    inverse, factor = ROPE_INIT_FUNCTIONS[rope.scaling["rope_type"]](config, torch.device("cpu"))
    # What transformers does not read, and SGLang multiplies yarn's own factor by.
    return inverse.float(), float(factor) * float(rope.scaling.get("attn_factor") or 1.0)


def attention_scale(hf: HFConfig) -> float | None:
    """What scores are multiplied by; None for Megatron's own 1 / sqrt(head_dim).

    yarn multiplies cosines and sines by a factor, which scales queries and keys both; where whole heads
    are rotated that is the square of it on the scores.
    """
    if hf.mla is not None:
        return None  # `MultiLatentAttention` computes its own
    _, factor = frequencies(hf.rope, hf)
    if factor == 1.0:
        return hf.attention_scale
    assert hf.rope.fraction == 1.0, "hf_config.rope_from refuses yarn on partly rotated heads"
    return float((hf.attention_scale or hf.head_dim**-0.5) * factor**2)
