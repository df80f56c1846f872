"""The CPU kernel of SGLang's seeded sampling, in torch: `sgl_kernel::murmur_hash32_cpu`.

MurmurHash3 (x86, 32 bit) of four words: low and high half of the seed, position, column. It gives
the same numbers as SGLang's GPU kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_SCHEMA = "murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor"
_LIBRARY: list[torch.library.Library] = []  # a library's operators live as long as it does


def define() -> None:
    """Define the operator where the real kernel package does not."""
    if hasattr(torch.ops.sgl_kernel, "murmur_hash32_cpu"):
        return
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define(_SCHEMA)
    library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
    _LIBRARY.append(library)


def murmur_hash32(seed: Tensor, positions: Tensor, col_indices: Tensor) -> Tensor:
    """Hash of (seed [N], position [N], column [M]), as int64 in [0, 2^32) -> [N, M].

    int64 products wrap; their low 32 bits are those of the unsigned product.
    """
    seed = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed.to(torch.int64)
    h = torch.zeros_like(seed)
    for word in (seed & _MASK, (seed >> 32) & _MASK, positions.to(torch.int64) & _MASK):
        h = _mix(h, word)
    h = _mix(h[:, None], col_indices.to(torch.int64)[None, :] & _MASK)
    return _finish(h ^ 16)  # 16 bytes were hashed


def _rotate(x: Tensor, bits: int) -> Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK


def _mix(h: Tensor, word: Tensor) -> Tensor:
    word = _rotate((word * 0xCC9E2D51) & _MASK, 15)
    h = h ^ ((word * 0x1B873593) & _MASK)
    return (_rotate(h, 13) * 5 + 0xE6546B64) & _MASK


def _finish(h: Tensor) -> Tensor:
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)
