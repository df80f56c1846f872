"""FLOPs of a sequence, against a hand count and against the matrices of transformers' own models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from megatron_rpp.model.cost import sequence_cost
from megatron_rpp.model.hf_config import HFConfig, Rope
from megatron_rpp.model.hf_mapping import read_hf_config
from tests.support.tiny_models import MODELS

LLAMA = HFConfig(
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=20,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=3,
    vocab_size=11,
    norm_eps=1e-5,
    rope=Rope(10_000.0),
    max_position_embeddings=64,
    tied_embeddings=True,
)


def test_a_llama_costs_what_is_counted_by_hand() -> None:
    """Weights a layer: q and o 8 x 12 each, k and v 8 x 6 each, gate, up and down 8 x 20 each: 768; output 8 x 11.

    Of 10 tokens each pair costs 2 x 3 operations for q . k and as many for v, of 4 heads: 48; a causal half of 100
    pairs is 50.
    """
    assert sequence_cost(LLAMA)(10) == 10 * 2 * (2 * 768 + 88) + 2 * 50 * 48


def test_a_sliding_layer_looks_back_over_its_window_only() -> None:
    hf = replace(LLAMA, sliding_window=4, sliding_layers=(True, False))
    weights = 2 * (2 * 768 + 88)

    assert sequence_cost(hf)(4) == sequence_cost(LLAMA)(4), "all within the window"
    # The window's pairs: the triangle of the first 4 tokens, then 4 of each of 6 tokens.
    assert sequence_cost(hf)(10) == 10 * weights + 50 * 48 + (8 + 24) * 48


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mla_dense", "mixtral", "deepseek_v2", "deepseek_v3"])
def test_weights_that_a_token_meets_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = MODELS[family]()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    hf = read_hf_config(str(tmp_path))
    chosen = hf.moe.top_k / hf.moe.num_experts if hf.moe else 0.0

    met = 0.0
    for name, weight in model.named_parameters():
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding) or weight.dim() < 2:
            continue
        met += weight.numel() * (chosen if ".experts." in name else 1.0)
    if hf.tied_embeddings:
        met += hf.vocab_size * hf.hidden_size  # the embedding, as an output layer

    assert sequence_cost(hf).linear == pytest.approx(2 * met)
