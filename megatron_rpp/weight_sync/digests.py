"""The digest that SGLang's weight checker gives a tensor: SHA-256 of its bytes on CPU, a kernel of its own on GPUs."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor

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
    """Of a tensor that a GPU server holds. SGLang's kernel wants it in one piece, so all are kept until the end."""

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []

    def update(self, piece: Tensor) -> None:
        """Raises ValueError for a tensor that is not on a GPU: the kernel has no form for CPUs."""
        if not piece.is_cuda:
            raise ValueError(
                "checksums of SGLang servers on GPUs can only be computed where the trainer runs on GPUs too; "
                "set weight_sync.verify=off"
            )
        self._pieces.append(piece.detach())

    def finish(self) -> str:
        from sglang.kernels.ops.memory.gpu_tensor_hash import gpu_tensor_hash  # needs triton: on GPU hosts only

        whole = torch.cat([piece.reshape(-1) for piece in self._pieces])
        self._pieces.clear()
        return f"{gpu_tensor_hash(whole):016x}"


def new_digest(device: str) -> Digest:
    """For servers on `device`, "cpu" or "cuda"."""
    return GpuDigest() if device == "cuda" else CpuDigest()
