"""FP8 blocks: against a plain loop, at ragged edges and extremes, and which tensors are stored so."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


def power_of_two_reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Transformer Engine's blockwise quantization, an element at a time: compute_scale_from_amax and the cast.

    The scale is 448 / amax rounded to float32, its mantissa dropped; where the quotient is infinite, 2^127.
    """
    rows, columns = math.ceil(weight.shape[0] / 128), math.ceil(weight.shape[1] / 128)
    w8, scale_inv = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i, j in product(range(rows), range(columns)):
        block = weight[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].float()
        amax, scale = np.float32(block.abs().max().item()), 1.0
        if amax > 0:
            with np.errstate(over="ignore"):
                quotient = np.float32(448) / amax
            scale = 2.0 ** (127 if np.isinf(quotient) else math.frexp(float(quotient))[1] - 1)
        scale_inv[i, j] = 1 / scale
        for x, y in np.ndindex(*block.shape):
            w8.view(torch.uint8)[128 * i + x, 128 * j + y] = nearest_byte(block[x, y].item() * scale)
    return w8, scale_inv


E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()  # 0 to 448, by byte


def nearest_byte(value: float) -> int:
    """Of E4M3, ties to the even byte. The product of a float32 and a power of two is exact in a Python float."""
    away = np.abs(E4M3 - abs(value))
    low, *tied = np.flatnonzero(away == away.min())
    byte = int(tied[0] if tied and low % 2 else low)
    return byte | (0x80 if math.copysign(1, value) < 0 else 0)


def weight_with_edges(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Blocks of many magnitudes, with outliers; one of zeros where there is room."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight *= 2.0 ** torch.randint(-4, 4, (math.ceil(rows / 128), 1)).repeat_interleave(128, 0)[:rows]
    weight[rows // 2, columns // 2] = 37.5
    if rows > 128:
        weight[128:256, :128] = 0
    return weight


@pytest.mark.parametrize("shape", [(128, 128), (130, 131), (5, 129), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_powers_of_two_are_transformer_engines_bytes_and_scales(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weight_with_edges(*shape).to(dtype)
    w8, scales = quantize(weight, power_of_two=True)
    expected, expected_scales = power_of_two_reference(weight)
    assert torch.equal(w8.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(scales, expected_scales)


@pytest.mark.parametrize(
    "value",
    [
        *(448.0 * 2.0**e for e in (-130, -20, 0, 119)),
        1e-45,
        1e-40,
        1.2e-38,
        1.3e-36,
        3.3e38,
        0.0,
        -447.99997,
        448.00003,
    ],
)
def test_powers_of_two_at_the_ends_of_float32(value: float) -> None:
    """Scales too large for float32 become 2^127, whose inverse is a denormal number; nothing overflows E4M3."""
    weight = torch.full((2, 3), value)
    w8, scales = quantize(weight, power_of_two=True)
    expected, expected_scales = power_of_two_reference(weight)
    assert torch.equal(w8.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(scales, expected_scales)
    assert torch.isfinite(w8.float()).all() and (scales > 0).all()


@given(st.integers(1, 300), st.integers(1, 300), st.integers(-60, 60), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_powers_of_two_hold_their_values_when_they_are_quantized_again(
    rows: int, columns: int, exponent: int, seed: int
) -> None:
    """fp8.params: the trainer's bytes go through bfloat16 to the engine. Only a block whose largest magnitude was
    rounded to 224, half of E4M3's, has other bytes then: all twice, and half of the scale."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    w8, scales = quantize(weight, power_of_two=True)
    held = dequantize(w8, scales)
    again, new_scales = quantize(held, power_of_two=True)
    assert torch.equal(dequantize(again, new_scales, torch.float32), dequantize(w8, scales, torch.float32))
    assert torch.equal(held.float(), dequantize(w8, scales, torch.float32)), "bfloat16 holds what FP8 stands for"
    largest = reference_scales(w8.float()) * 448
    assert torch.equal(new_scales, torch.where(largest == 224, scales / 2, scales))
    if not (largest == 224).any():
        assert torch.equal(again.view(torch.uint8), w8.view(torch.uint8))


def test_a_block_whose_largest_is_rounded_to_half_the_range_settles_at_once() -> None:
    w8, scales = quantize(torch.full((1, 1), 230.0), power_of_two=True)
    assert (w8.float().item(), scales.item()) == (224.0, 1.0)
    again, halved = quantize(dequantize(w8, scales), power_of_two=True)
    assert (again.float().item(), halved.item()) == (448.0, 0.5)
    assert quantize(dequantize(again, halved), power_of_two=True)[1].item() == 0.5


@pytest.mark.parametrize(("rows", "is_same"), [(128, True), (256, True), (64, False), (96, False)])
def test_shards_have_the_blocks_of_the_whole_where_they_are_cut_between_blocks(rows: int, is_same: bool) -> None:
    weight = weight_with_edges(2 * rows, 128, seed=7)
    weight[0, 0] = 400.0  # one shard's largest magnitude is not the other's
    whole = dequantize(*quantize(weight, power_of_two=True))
    shards = torch.cat([dequantize(*quantize(part, power_of_two=True)) for part in weight.chunk(2)])
    assert torch.equal(whole, shards) == is_same


def test_a_block_of_zeros_has_scale_one_and_stays_zero() -> None:
    weight = torch.zeros(256, 128)
    weight[200, 3] = 7.0
    w8, scales = quantize(weight)
    assert scales.tolist() == [[1.0], [1 / 64]]
    assert torch.equal(dequantize(w8, scales, torch.float32), weight)
    assert quantize(weight, power_of_two=True)[1].tolist() == [[1.0], [1 / 64]]


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-38, 3e38])
def test_the_smallest_and_largest_weights_stay_finite(value: float) -> None:
    w8, scales = quantize(torch.full((3, 3), value))
    assert torch.isfinite(w8.float()).all() and torch.isfinite(scales).all() and (scales > 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_diverged_is_refused(value: float) -> None:
    weight = torch.ones(200, 200)
    weight[150, 7] = value
    for power_of_two in (False, True):
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize(weight, power_of_two=power_of_two)


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


def test_layers_that_training_keeps_in_bfloat16_are_not_quantized_and_transformers_is_told() -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    name = "model.layers.{}.self_attn.q_proj"
    quantized = [is_quantized(f"{name.format(i)}.weight", (256, 128), bf16_layers=[0, 1]) for i in (0, 1, 2, 10, 11)]
    assert quantized == [False, False, True, True, True]
    told = quantization_config([0, 1])["modules_to_not_convert"]
    assert [should_convert_module(name.format(i), told) for i in (0, 1, 2, 10, 11)] == quantized


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


class DividesByNoNumber(TorchDispatchMode):
    """CUDA divides by a number as it multiplies by its reciprocal, which rounds twice; CPU does not."""

    def __init__(self) -> None:
        super().__init__()
        self.divisions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_, torch.ops.aten.true_divide):
            self.divisions += 1
            assert all(isinstance(x, Tensor) and x.dim() > 0 for x in args), f"{func} of {args}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_scale_is_divided_in_a_way_that_gives_the_same_bits_on_gpus(power_of_two: bool) -> None:
    with DividesByNoNumber() as mode:
        quantize(torch.randn(130, 140), power_of_two=power_of_two)
    assert mode.divisions >= 1
    with pytest.raises(AssertionError, match="div"), DividesByNoNumber():
        torch.randn(3, 3) / 448.0
