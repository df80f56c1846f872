"""FP8 blocks: against a plain loop, at ragged edges and extremes, and which tensors are stored so."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rpp.model.hf_io import fp8_blocks
from megatron_rpp.model.hf_io.fp8_blocks import dequantize, is_quantized, quantization_config, quantize

SHAPES = [(1, 1), (128, 128), (129, 128), (128, 127), (300, 200), (256, 384), (5, 513)]


def reference_scales(weight: Tensor) -> Tensor:
    """Largest magnitude / 448 of each block, by loops over blocks."""
    rows, columns = math.ceil(weight.shape[0] / 128), math.ceil(weight.shape[1] / 128)
    scales = torch.empty(rows, columns)
    for i, j in product(range(rows), range(columns)):
        largest = weight[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].float().abs().max()
        scales[i, j] = largest / 448 if largest > 0 else 1.0
    return scales


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_is_the_plain_computation_element_by_element(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    w8, scale_inv = quantize(weight)
    expected = reference_scales(weight)
    assert (w8.dtype, w8.shape, scale_inv.dtype) == (torch.float8_e4m3fn, weight.shape, torch.float32)
    assert torch.equal(scale_inv, expected)
    for i, j in product(range(0, shape[0], 7), range(0, shape[1], 5)):
        element = (weight[i, j].float() / expected[i // 128, j // 128]).to(torch.float8_e4m3fn)
        assert w8[i, j].float() == element.float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 128)])
def test_dequantize_is_the_plain_computation_element_by_element(shape: tuple[int, int], block: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    w8 = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]), generator=generator)
    whole = dequantize(w8, scales, torch.float32, block)
    for i, j in product(range(0, shape[0], 7), range(0, shape[1], 5)):
        assert whole[i, j] == w8[i, j].float() * scales[i // block[0], j // block[1]]


def test_slabs_of_a_weight_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(700, 300, generator=torch.Generator().manual_seed(2))
    w8, scales = quantize(weight)
    whole = dequantize(w8, scales)
    monkeypatch.setattr(fp8_blocks, "_SLAB_ELEMENTS", 2 * 128 * 384)
    assert torch.equal(quantize(weight)[0].view(torch.uint8), w8.view(torch.uint8))
    assert torch.equal(quantize(weight)[1], scales) and torch.equal(dequantize(w8, scales), whole)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(-30, 30), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_error_is_at_most_a_half_step_of_e4m3(rows: int, columns: int, exponent: int, seed: int) -> None:
    """3 bits of mantissa: 1/16 of the value, or half of the smallest step, 2^-10 scales."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    w8, scales = quantize(weight)
    error = (dequantize(w8, scales, torch.float32) - weight).abs()
    step = dequantize(torch.ones(rows, columns).to(torch.float8_e4m3fn), scales, torch.float32)
    assert (error <= torch.maximum(weight.abs() / 16, step * 2.0**-10) * (1 + 1e-5)).all()


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_quantizing_again_changes_no_weight_and_settles_the_scales(rows: int, columns: int, seed: int) -> None:
    """Load (bfloat16) and export again: the bytes stay, and scales that bfloat16 rounded stay from then on."""
    first, scales = quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
    second, rounded = quantize(dequantize(first, scales))
    third, settled = quantize(dequantize(second, rounded))
    assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    assert torch.equal(first.view(torch.uint8), third.view(torch.uint8))
    assert torch.equal(rounded, settled)
    torch.testing.assert_close(rounded, scales, rtol=2**-8, atol=0)


def test_a_block_of_zeros_has_scale_one_and_stays_zero() -> None:
    weight = torch.zeros(256, 128)
    weight[200, 3] = 7.0
    w8, scales = quantize(weight)
    assert scales.tolist() == [[1.0], [1 / 64]]
    assert torch.equal(dequantize(w8, scales, torch.float32), weight)


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-38, 3e38])
def test_the_smallest_and_largest_weights_stay_finite(value: float) -> None:
    w8, scales = quantize(torch.full((3, 3), value))
    assert torch.isfinite(w8.float()).all() and torch.isfinite(scales).all() and (scales > 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_diverged_is_refused(value: float) -> None:
    weight = torch.ones(200, 200)
    weight[150, 7] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(weight)


def test_a_view_that_is_not_contiguous_is_quantized_as_its_copy() -> None:
    weight = torch.randn(200, 150, generator=torch.Generator().manual_seed(3)).T
    assert torch.equal(quantize(weight)[0].float(), quantize(weight.contiguous())[0].float())


def test_scales_of_another_shape_and_weights_that_are_not_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(130, 5\) in blocks of \(128, 128\) needs scales \(2, 1\), not \(1, 1\)"):
        dequantize(torch.zeros(130, 5).to(torch.float8_e4m3fn), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"2-D weights, and this one is \(3,\)"):
        quantize(torch.ones(3))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.11.self_attn.o_proj.weight",
        "model.layers.0.self_attn.q_a_proj.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.0.self_attn.kv_b_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.3.mlp.experts.255.down_proj.weight",
        "model.layers.3.mlp.shared_experts.up_proj.weight",
        "model.layers.0.block_sparse_moe.experts.7.w2.weight",
    ],
)
def test_projections_are_stored_as_fp8(name: str) -> None:
    assert is_quantized(name, (256, 128))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", (256, 128)),
        ("lm_head.weight", (256, 128)),
        ("model.layers.0.input_layernorm.weight", (128,)),
        ("model.layers.0.self_attn.q_norm.weight", (128,)),
        ("model.layers.0.self_attn.q_proj.bias", (128,)),
        ("model.layers.0.mlp.gate.weight", (8, 128)),
        ("model.layers.0.mlp.gate.e_score_correction_bias", (8,)),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 128)),
        ("model.layers.0.block_sparse_moe.gate.weight", (8, 128)),
        ("model.layers.61.eh_proj.weight", (128, 256)),
        ("model.layers.61.shared_head.head.weight", (256, 128)),
        ("model.layers.61.embed_tokens.weight", (256, 128)),
        ("vision.q_proj.weight", (256, 128)),
    ],
)
def test_other_tensors_keep_their_dtype(name: str, shape: tuple[int, ...]) -> None:
    assert not is_quantized(name, shape)


def test_transformers_reads_the_quantization_config_as_blocks_of_fp8() -> None:
    from transformers import AutoConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    read = AutoQuantizationConfig.from_dict(quantization_config())
    assert type(read).__name__ == "FineGrainedFP8Config" and read.weight_block_size == [128, 128]
    assert AutoConfig.for_model("qwen3", quantization_config=quantization_config()).quantization_config
    assert quantization_config() == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares CUDA with CPU")
def test_cuda_gives_the_bytes_that_cpu_gives() -> None:
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(4))
    w8, scales = quantize(weight)
    on_cuda, scales_on_cuda = quantize(weight.cuda())
    assert torch.equal(on_cuda.cpu().view(torch.uint8), w8.view(torch.uint8))
    assert torch.equal(scales_on_cuda.cpu(), scales)
    assert torch.equal(dequantize(on_cuda, scales_on_cuda).cpu(), dequantize(w8, scales))
