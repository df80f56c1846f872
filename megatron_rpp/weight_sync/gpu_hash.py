"""The 64-bit hash by which SGLang's weight checker tells tensors on GPUs apart, in torch operations of any device.

As `gpu_tensor_hash` of SGLang 0.5.17 and 0.5.23 has it, whose kernel wants Triton and the tensor in one piece. The
tensor's bytes are words of 32 bits, the last filled up with zeros. Each word is mixed with its index by two seeds; the
sums of 8192 words, mixed once more with the tensor's length, are the halves of a 64-bit number; and those numbers are
summed and mixed. All arithmetic is modulo 2^32 or 2^64: signed integers have the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_BYTES = 8192 * 4
_SLAB_BYTES = 512 * TILE_BYTES  # hashed at a time; four working copies of it at most
_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1
# The seed, and what the kernel's launcher makes of it; (seed, factor of the index, bits by which it is turned).
_SEED = 0x243F6A88
_HALVES = (
    (_SEED, 0x27D4EB2D, 15),
    (((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK32, 0x165667B1, 13),
)


class GpuHash:
    """Fed with bytes in order; keeps less than a slab of them, and 8 bytes of sums a tile."""

    def __init__(self) -> None:
        self._waiting: list[Tensor] = []  # uint8 [n], in order
        self._held = 0  # bytes of them
        self._words = 0  # hashed so far
        self._sums: list[Tensor] = []  # int32 [tiles, 2], of the words of each tile

    @torch.no_grad()
    def update(self, piece: Tensor) -> None:
        """Of any dtype and layout, and always on the same device. It must not be written to until `finish`."""
        flat = piece.detach().contiguous().reshape(-1)
        if flat.numel():
            self._waiting.append(flat.view(torch.uint8))
            self._held += self._waiting[-1].numel()
        if self._held >= _SLAB_BYTES:
            self._hash_tiles()

    @torch.no_grad()
    def finish(self) -> int:
        """The hash of all that came; 0 of nothing. Waits for the device."""
        if padding := -self._held % 4:
            self._waiting.append(torch.zeros(padding, dtype=torch.uint8, device=self._waiting[0].device))
            self._held += padding
        if self._held >= TILE_BYTES:
            self._hash_tiles()
        if self._held:
            self._hash(self._joined())
        return _finish(torch.cat(self._sums), self._words) if self._sums else 0

    def _hash_tiles(self) -> None:
        """Hash what waits, up to the last whole tile."""
        joined = self._joined()
        whole = joined.numel() // TILE_BYTES * TILE_BYTES
        for start in range(0, whole, _SLAB_BYTES):
            self._hash(joined[start : min(start + _SLAB_BYTES, whole)])
        if rest := joined.numel() - whole:
            self._waiting, self._held = [joined[whole:].clone()], rest  # not a view, which would keep all of it

    def _joined(self) -> Tensor:
        joined = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
        self._waiting, self._held = [], 0
        return joined

    def _hash(self, data: Tensor) -> None:
        """data: uint8 [n], whole tiles, or the end of the tensor in whole words."""
        if data.storage_offset() % 4:
            data = data.clone()  # a view of words must begin at one
        words = data.view(torch.int32)
        self._sums.append(torch.stack([_tile_sums(words, self._words, *half) for half in _HALVES], dim=1))
        self._words += words.numel()


def _tile_sums(words: Tensor, first: int, seed: int, factor: int, turn: int) -> Tensor:
    """int32 [tiles]: of int32 words [n], of which the first has the index `first` in its tensor, all mixed."""
    index = torch.arange(words.numel(), dtype=torch.int32, device=words.device)
    index += _signed(first)
    place = index * _signed(factor)
    place += _signed(seed)
    place ^= index << turn
    place ^= _right(index, 32 - turn)
    mixed = _mix(place.bitwise_xor_(words))
    tile = TILE_BYTES // 4
    whole = len(mixed) // tile * tile
    sums = [mixed[:whole].view(-1, tile).sum(dim=1), mixed[whole:].sum(dim=0, keepdim=True)][: 1 + (whole < len(mixed))]
    return torch.cat(sums).to(torch.int32)  # of int64, without the high bits


def _mix(x: Tensor) -> Tensor:
    """Murmur3's finalizer of int32 words, in place."""
    x ^= _right(x, 16)
    x *= _signed(0x85EBCA6B)
    x ^= _right(x, 13)
    x *= _signed(0xC2B2AE35)
    x ^= _right(x, 16)
    return x


def _right(x: Tensor, bits: int) -> Tensor:
    """int32 shifted as if it had no sign."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _finish(sums: Tensor, words: int) -> int:
    """sums: int32 [tiles, 2], of a tensor of so many words."""
    halves = _mix(sums ^ _signed(words * 4)).to(torch.int64) & _MASK32
    high, low = halves.sum(dim=0).tolist()
    found = ((high << 32) + low) & _MASK64
    for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        found ^= found >> bits
        found = found * factor & _MASK64
    return found ^ found >> 31


def _signed(number: int) -> int:
    """The int32 of the same bits as `number` modulo 2^32."""
    number &= _MASK32
    return number - (1 << 32) if number >> 31 else number
