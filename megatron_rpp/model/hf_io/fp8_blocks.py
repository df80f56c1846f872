"""FP8 block-scaled weights, as DeepSeek-V3 and Qwen3-FP8 checkpoints store them.

A weight [M, N] is float8_e4m3fn beside `<its name>_scale_inv`, float32 [ceil(M/128), ceil(N/128)]:
w[i, j] = w8[i, j] * scale_inv[i // 128, j // 128].
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = (128, 128)
SCALE_SUFFIX = "_scale_inv"  # appended to the whole name of a weight
_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # a denormal scale would make w / scale infinite
_LARGEST_POWER = 2.0**127  # what Transformer Engine scales a block by that 448 / magnitude is too large for
_EXPONENT = 0xFF800000 - (1 << 32)  # sign and exponent of a float32, as int32
_SLAB_ELEMENTS = 1 << 23  # the float32 working copy is 32 MiB, or one row of blocks if that is more

# Linear layers that SGLang builds with a quantization config. Norms, routers (mlp.gate), embeddings,
# lm_head and the eh_proj of DeepSeek's MTP layers it does not, and the releases keep them in bfloat16.
_QUANTIZED = re.compile(
    r"\.layers\.\d+\..*\.("
    r"(q|k|v|o|qkv|q_a|q_b|kv_b|gate|up|down|gate_up)_proj|kv_a_proj_with_mqa|experts\.\d+\.w[123]"
    r")\.weight$"
)
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_PARTS = ("self_attn", "mlp", "block_sparse_moe")  # of a layer, those with such projections


def quantize(weight: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """The float8_e4m3fn form of `weight` [M, N] and its scales, float32 [ceil(M/128), ceil(N/128)].

    A scale is its block's largest magnitude / 448, and 1 for a block of zeros; with power_of_two the next power of
    two above that, bit for bit as Transformer Engine's blockwise recipe quantizes. Works on row slabs, on the device
    of `weight`.

    Raises ValueError for a weight that is not 2-D, and for one that holds NaN or infinity.
    """
    _require_2d(weight)
    scale_inv = torch.empty(scale_shape(weight.shape), dtype=torch.float32, device=weight.device)
    quantized = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    finite = torch.ones((), dtype=torch.bool, device=weight.device)
    for blocks, rows in _slabs(weight.shape, BLOCK):
        tiles = _tiles(weight[rows], BLOCK).float()  # [b, 128, n, 128]
        largest = tiles.abs().amax(dim=(1, 3))  # [b, n]
        finite &= torch.isfinite(largest).all()
        scaled, scale_inv[blocks] = (_by_powers if power_of_two else _by_quotients)(tiles, largest)
        whole = scaled.flatten(2).flatten(0, 1)
        quantized[rows] = whole[: quantized[rows].shape[0], : weight.shape[1]].to(torch.float8_e4m3fn)
    if not finite:
        raise ValueError("the weight holds NaN or infinity, which FP8 blocks cannot; train on, or export bfloat16")
    return quantized, scale_inv


def _by_quotients(tiles: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """(tiles / scale, scale), the scale being largest / 448."""
    scale = torch.div(largest, torch.full_like(largest, _LARGEST))  # CUDA takes `/ 448.0` for a product with 1 / 448
    scale = torch.where(scale == 0, 1.0, scale.clamp(min=_SMALLEST_SCALE))
    return tiles / scale[:, None, :, None], scale


def _by_powers(tiles: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """(tiles * factor, 1 / factor), the factor being 448 / largest less its mantissa, so that nothing overflows.

    As compute_scale_from_amax in Transformer Engine's common/recipe/recipe_common.cuh, amax_epsilon being 0.
    """
    factor = torch.div(torch.full_like(largest, _LARGEST), largest)  # `448.0 / largest` would round twice
    factor = torch.where(torch.isinf(factor), _LARGEST_POWER, factor)
    factor = (factor.view(torch.int32) & _EXPONENT).view(torch.float32)
    factor = torch.where(largest == 0, 1.0, factor)
    return tiles * factor[:, None, :, None], factor.reciprocal()


def dequantize(
    w8: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.bfloat16, block: tuple[int, int] = BLOCK
) -> Tensor:
    """w8 [M, N] float8 times the scale of its block, as `dtype`; the product is float32, rounded once.

    scale_inv: [ceil(M/block[0]), ceil(N/block[1])], any floating dtype. ValueError for another shape.
    """
    _require_2d(w8)
    if tuple(scale_inv.shape) != scale_shape(w8.shape, block):
        raise ValueError(
            f"a weight {tuple(w8.shape)} in blocks of {block} needs scales {scale_shape(w8.shape, block)}, "
            f"not {tuple(scale_inv.shape)}"
        )
    whole = torch.empty(w8.shape, dtype=dtype, device=w8.device)
    scale = scale_inv.to(w8.device, torch.float32)
    for blocks, rows in _slabs(w8.shape, block):
        tiles = _tiles(w8[rows], block).float() * scale[blocks][:, None, :, None]
        slab = whole[rows]
        slab.copy_(tiles.flatten(2).flatten(0, 1)[: slab.shape[0], : slab.shape[1]])
    return whole


def scale_shape(shape: torch.Size | tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """Blocks down and across a weight [M, N]; those at its edges may be smaller."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def is_quantized(hf_name: str, shape: torch.Size | tuple[int, ...], bf16_layers: Collection[int] = ()) -> bool:
    """Whether an FP8 export stores this tensor as FP8: the 2-D projections of attention, MLP and experts.

    bf16_layers: those that stay as they are.
    """
    if len(shape) != 2 or _QUANTIZED.search("." + hf_name) is None:
        return False
    layer = _LAYER.search("." + hf_name)
    return layer is None or int(layer[1]) not in bf16_layers


def quantization_config(bf16_layers: Collection[int] = ()) -> dict[str, Any]:
    """What config.json says of such a checkpoint, to SGLang and transformers.

    Neither needs to be told of routers, norms, embeddings and lm_head, which both build unquantized. Both take a
    module's name for all that is in it; transformers takes it for a regular expression too, so that model.layers.1
    alone would stand for layer 10 as well.
    """
    found = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(BLOCK)}
    if bf16_layers:
        found["modules_to_not_convert"] = [
            f"model.layers.{layer}.{part}" for layer in sorted(bf16_layers) for part in _PARTS
        ]
    return found


def _require_2d(weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"FP8 blocks are of 2-D weights, and this one is {tuple(weight.shape)}")


def _slabs(shape: torch.Size, block: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """(rows of blocks, rows of the weight) of each slab."""
    across = max(1, scale_shape(shape, block)[1]) * block[0] * block[1]
    step = max(1, _SLAB_ELEMENTS // across)
    for start in range(0, scale_shape(shape, block)[0], step):
        yield slice(start, start + step), slice(start * block[0], (start + step) * block[0])


def _tiles(rows: Tensor, block: tuple[int, int]) -> Tensor:
    """rows [m, n] as [m/block[0], block[0], n/block[1], block[1]], padded with zeros to whole blocks."""
    below, beside = -rows.shape[0] % block[0], -rows.shape[1] % block[1]
    if below or beside:
        rows = pad(rows.float(), (0, beside, 0, below))  # float8 has no pad
    return rows.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1]))
