"""Matrices on a rank that FP8 can multiply, and the advice where they are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.performance import Fp8Config
from megatron_rpp.config.schema import Config, ParallelConfig
from megatron_rpp.model.fp8_shapes import check_fp8_shapes, fp8_matrices
from megatron_rpp.model.hf_config import MLA, HFConfig, MoE, Rope

SMOLLM2 = HFConfig(
    "LlamaForCausalLM", num_layers=30, hidden_size=576, ffn_hidden_size=1536, num_attention_heads=9,
    num_query_groups=3, head_dim=64, vocab_size=49152, norm_eps=1e-5, rope=Rope(1e5),
    max_position_embeddings=8192, tied_embeddings=True,
)  # fmt: skip
QWEN = replace(SMOLLM2, hidden_size=2048, ffn_hidden_size=11008, num_attention_heads=16, num_query_groups=2,
               head_dim=128, num_layers=36)  # fmt: skip
EXPERTS = MoE(64, 6, 1408, (False, *[True] * 26), shared_ffn_hidden_size=2816)
DEEPSEEK = replace(SMOLLM2, num_layers=27, hidden_size=2048, ffn_hidden_size=10944, num_attention_heads=16,
                   num_query_groups=16, moe=EXPERTS, mla=MLA(None, 512, 128, 64, 128))  # fmt: skip


def config(recipe: str, *, first: int = 0, **parallel: int) -> Config:
    return Config(fp8=Fp8Config(recipe, bf16_first_layers=first), parallel=ParallelConfig(**parallel))


def message(hf: HFConfig, recipe: str, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_fp8_shapes(config(recipe, **settings), hf)
    return str(caught.value)


def test_the_matrices_are_those_of_one_rank() -> None:
    found = {m.name: (m.outer, m.inner) for m in fp8_matrices(QWEN, ParallelConfig(tensor=2))}
    assert found == {
        "linear_qkv": (1280, 2048), "linear_proj": (2048, 1024), "linear_fc1": (11008, 2048), "linear_fc2": (2048, 5504)
    }  # fmt: skip


def test_latent_attention_and_experts_have_theirs() -> None:
    found = {m.name: (m.outer, m.inner) for m in fp8_matrices(DEEPSEEK, ParallelConfig(tensor=2, expert_tensor=2))}
    assert found["linear_q_proj"] == (8 * 192, 2048) and found["linear_kv_down_proj"] == (576, 2048)
    assert found["linear_kv_up_proj"] == (8 * 256, 512) and found["linear_proj"] == (2048, 8 * 128)
    assert found["an expert's linear_fc1"] == (1408, 2048) and found["an expert's linear_fc2"] == (2048, 704)
    assert found["the shared expert's linear_fc2"] == (2048, 1408) and found["linear_fc2"] == (2048, 5472)
    low_rank = replace(DEEPSEEK, mla=MLA(1536, 512, 128, 64, 128))
    found = {m.name: (m.outer, m.inner) for m in fp8_matrices(low_rank, ParallelConfig())}
    assert (found["linear_q_down_proj"], found["linear_q_up_proj"]) == ((1536, 2048), (16 * 192, 1536))


def test_a_small_model_suits_scales_of_whole_tensors_and_no_blocks() -> None:
    for recipe in ("none", "delayed", "tensorwise", "mxfp8"):
        check_fp8_shapes(config(recipe), SMOLLM2)
    assert message(SMOLLM2, "blockwise") == (
        "fp8.recipe=blockwise needs multiples of 128, and linear_qkv has 576 input features on a rank; "
        "use fp8.recipe=tensorwise"
    )


def test_a_split_too_fine_is_to_be_made_coarser() -> None:
    check_fp8_shapes(config("blockwise", tensor=2), QWEN)
    assert message(QWEN, "blockwise", tensor=4).endswith(
        "linear_fc2 has 2752 input features on a rank; lower parallel.tensor=4"
    )
    assert "an expert's linear_fc2 has 704 input features on a rank; lower parallel.expert_tensor=2" in message(
        replace(DEEPSEEK, moe=replace(EXPERTS, layers=(True,) * 27)), "blockwise", expert_tensor=2
    )


def test_odd_widths_have_no_fp8_at_all() -> None:
    assert message(replace(QWEN, hidden_size=2040), "tensorwise").endswith("set fp8.recipe=none")


def test_layers_in_bfloat16_are_at_most_those_of_a_stage() -> None:
    check_fp8_shapes(config("tensorwise", first=18, pipeline=2), QWEN)
    assert "fp8.bf16_first_layers=19 must be at most 18" in message(QWEN, "tensorwise", first=19, pipeline=2)


def test_some_layer_is_left_for_fp8() -> None:
    for first, last in ((18, 18), (36, 1)):
        kept = Config(fp8=Fp8Config("tensorwise", bf16_first_layers=first, bf16_last_layers=last))
        with pytest.raises(ConfigError, match=f"bf16_first_layers={first} and .*={last} leave none of num_hidden.*=36"):
            check_fp8_shapes(kept, QWEN)
    check_fp8_shapes(Config(fp8=Fp8Config("tensorwise", bf16_first_layers=18, bf16_last_layers=17)), QWEN)
