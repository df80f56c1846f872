"""Tensors whose bytes are on the host for a while, and whose device memory is free meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, UntypedStorage

from megatron_rpp.device.memory import host_block, wait_for_device

BLOCK_BYTES = 1 << 28
"""A power of two: torch rounds page-locked memory up to one."""


class HostCopy:
    """`take(tensors)`, then `give_back()`, as often as wanted; host memory is allocated once and kept.

    Tensor objects and their views stay what they are, since only their storages are emptied and filled again.
    """

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes, self._blocks = block_bytes, list[Tensor]()
        self._away: list[tuple[UntypedStorage, int, int]] = []  # with its bytes, and where on the host they begin

    @property
    def nbytes(self) -> int:
        """That are on the host now."""
        return sum(size for _, size, _ in self._away)

    @torch.no_grad()
    def take(self, tensors: Iterable[Tensor]) -> None:
        """Empty the storages of `tensors`, each once. Where that fails, all of them are still whole."""
        assert not self._away, "what was taken has yet to be given back"
        found, end = [], 0
        for storage in storages_of(tensors):
            found.append((storage, storage.nbytes(), end))
            end += storage.nbytes()
        while len(self._blocks) * self._block_bytes < end:
            self._blocks.append(host_block(self._block_bytes))
        for storage, size, start in found:
            for part, host in self._pieces(storage, size, start):
                host.copy_(part, non_blocking=True)
        wait_for_device()
        self._away = found
        for storage, _, _ in found:
            storage.resize_(0)

    @torch.no_grad()
    def give_back(self) -> None:
        """Fill them again. What a lack of memory leaves behind is still on the host, for another call."""
        while self._away:
            storage, size, start = self._away[-1]
            storage.resize_(size)
            for part, host in self._pieces(storage, size, start):
                part.copy_(host, non_blocking=True)
            self._away.pop()
        wait_for_device()  # before the next `take` writes over the blocks

    def _pieces(self, storage: UntypedStorage, size: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(bytes of the storage, the same on the host): a storage may reach over several blocks."""
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        done = 0
        while done < size:
            block, offset = divmod(start + done, self._block_bytes)
            length = min(size - done, self._block_bytes - offset)
            yield whole[done : done + length], self._blocks[block][offset : offset + length]
            done += length


def storages_of(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    """Of `tensors`, each once; those that hold something."""
    found = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return [storage for storage in found.values() if storage.nbytes() > 0]
