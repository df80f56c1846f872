"""FP8 block-scaled weights, as DeepSeek-V3 and Qwen3-FP8 checkpoints store them.

A weight [M, N] is float8_e4m3fn beside `<its name>_scale_inv`, float32 [ceil(M/128), ceil(N/128)]:
w[i, j] = w8[i, j] * scale_inv[i // 128, j // 128].
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = (128, 128)
SCALE_SUFFIX = "_scale_inv"  # appended to the whole name of a weight
_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # a denormal scale would make w / scale infinite
_SLAB_ELEMENTS = 1 << 23  # the float32 working copy is 32 MiB, or one row of blocks if that is more

# Linear layers that SGLang builds with a quantization config. Norms, routers (mlp.gate), embeddings,
# lm_head and the eh_proj of DeepSeek's MTP layers it does not, and the releases keep them in bfloat16.
_QUANTIZED = re.compile(
    r"\.layers\.\d+\..*\.("
    r"(q|k|v|o|qkv|q_a|q_b|kv_b|gate|up|down|gate_up)_proj|kv_a_proj_with_mqa|experts\.\d+\.w[123]"
    r")\.weight$"
)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The float8_e4m3fn form of `weight` [M, N] and its scales, float32 [ceil(M/128), ceil(N/128)].

    A scale is its block's largest magnitude / 448, and 1 for a block of zeros. Works on row slabs, on
    the device of `weight`.

    Raises ValueError for a weight that is not 2-D, and for one that holds NaN or infinity.
    """
    _require_2d(weight)
    scale_inv = torch.empty(scale_shape(weight.shape), dtype=torch.float32, device=weight.device)
    quantized = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for blocks, rows in _slabs(weight.shape, BLOCK):
        tiles = _tiles(weight[rows], BLOCK).float()  # [b, 128, n, 128]
        scale = tiles.abs().amax(dim=(1, 3)) / _LARGEST  # [b, n]
        scale = torch.where(scale == 0, 1.0, scale.clamp(min=_SMALLEST_SCALE))
        scale_inv[blocks] = scale
        whole = (tiles / scale[:, None, :, None]).flatten(2).flatten(0, 1)
        quantized[rows] = whole[: quantized[rows].shape[0], : weight.shape[1]].to(torch.float8_e4m3fn)
    if not torch.isfinite(scale_inv).all():
        raise ValueError("the weight holds NaN or infinity, which FP8 blocks cannot; train on, or export bfloat16")
    return quantized, scale_inv


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


def is_quantized(hf_name: str, shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether an FP8 export stores this tensor as FP8: the 2-D projections of attention, MLP and experts."""
    return len(shape) == 2 and _QUANTIZED.search("." + hf_name) is not None


def quantization_config() -> dict[str, Any]:
    """What config.json says of such a checkpoint, to SGLang and transformers.

    Neither needs modules_to_not_convert: both build routers, norms, embeddings and lm_head unquantized.
    """
    return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(BLOCK)}


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
