"""The digest that SGLang's weight checker gives a tensor: SHA-256 of its bytes on CPU, a hash of its own on GPUs."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor

from megatron_rpp.weight_sync.gpu_hash import GpuHash

_DIGEST_BYTES = 8


class Digest(Protocol):
    """Fed with the pieces of one tensor, in the order of its bytes."""

    def update(self, piece: Tensor) -> None: ...

    def finish(self) -> str:
        """16 hexadecimal digits."""
        ...


class CpuDigest:
    """Of a tensor that a CPU server holds; pieces are hashed as they come, and not kept."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def update(self, piece: Tensor) -> None:
        flat = piece.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            self._sha.update(flat.view(torch.uint8).numpy().data)

    def finish(self) -> str:
        return self._sha.digest()[:_DIGEST_BYTES].hex()


class GpuDigest:
    """Of a tensor that a GPU server holds. The pieces may be on any device, but all on the same."""

    def __init__(self) -> None:
        self._hash = GpuHash()

    def update(self, piece: Tensor) -> None:
        self._hash.update(piece)

    def finish(self) -> str:
        return f"{self._hash.finish():016x}"


def new_digest(device: str) -> Digest:
    """For servers on `device`, "cpu" or "cuda"."""
    return GpuDigest() if device == "cuda" else CpuDigest()
