"""Our block quantizer gives the bytes of Transformer Engine's: trainer and servers hold the same values."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_rpp.model.hf_io.fp8_blocks import dequantize, quantize
from tests.gpu.recipes import recipes_here
from tests.gpu.site import Site


def a_weight(site: Site) -> Tensor:
    """[512, 384] bfloat16: blocks of very different magnitudes, one of zeros, one with a lone outlier."""
    torch.manual_seed(0)
    blocks = torch.randn(4, 128, 3, 128) * torch.logspace(-6, 3, 12).view(4, 1, 3, 1)
    blocks[0, :, 0] = 0
    blocks[1, 5, 1, 7] = 1e4
    return blocks.reshape(512, 384).bfloat16().to(site.parallel.device)


def engine_quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(values [M, N] float8, scales [M / 128, N / 128] float32) as Transformer Engine's recipe quantizes weights."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    quantizer = Float8BlockQuantizer(tex.DType.kFloat8E4M3, rowwise=True, columnwise=False, block_scaling_dim=2)
    held = quantizer(weight).get_metadata()
    rows, columns = (size // 128 for size in weight.shape)
    # The scales' last dimension is padded to a multiple of 4.
    return held["rowwise_data"].view(torch.float8_e4m3fn), held["rowwise_scale_inv"][:rows, :columns]


def assert_same(site: Site, other: tuple[Tensor, Tensor]) -> None:
    """`other` is what our quantizer gives `a_weight`."""
    values, scales = quantize(a_weight(site), power_of_two=True)
    assert torch.equal(scales, other[1])
    assert torch.equal(values.view(torch.uint8), other[0].view(torch.uint8))


def test_block_quantized_bytes_are_transformer_engines(site: Site) -> None:
    if "blockwise" not in recipes_here():
        pytest.skip("this GPU has no blockwise")
    assert_same(site, engine_quantized(a_weight(site)))


def device_is_cpu(site: Site) -> None:
    """Also of ragged blocks, with scales of both kinds, and back to bfloat16."""
    for weight, power_of_two in product((a_weight(site), a_weight(site)[:300, :200]), (False, True)):
        here = quantize(weight, power_of_two=power_of_two)
        there = quantize(weight.cpu(), power_of_two=power_of_two)
        assert torch.equal(here[0].cpu().view(torch.uint8), there[0].view(torch.uint8))
        assert torch.equal(here[1].cpu(), there[1])
        assert torch.equal(dequantize(*here).cpu(), dequantize(*there))


def test_cuda_quantizes_to_the_bytes_of_cpu(site: Site) -> None:
    device_is_cpu(site)
