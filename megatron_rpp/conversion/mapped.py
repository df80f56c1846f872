"""Tensors that are mapped from files: their pages count as this process's memory until they are let go."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

SLAB_BYTES = 1 << 24
_libc = ctypes.CDLL(None)


def copied(mapped: Tensor) -> Tensor:
    """A copy of `mapped`, contiguous, whose own pages leave memory as they are copied. It is not read again."""
    out = torch.empty(mapped.shape, dtype=mapped.dtype)
    if not mapped.is_contiguous():
        return out.copy_(mapped)
    step = SLAB_BYTES // mapped.element_size()
    for source, target in zip(mapped.reshape(-1).split(step), out.reshape(-1).split(step), strict=True):
        target.copy_(source)
        _let_go(source)
    return out


def _let_go(part: Tensor) -> None:
    """Drop the whole pages of a contiguous tensor; a file's would be read again if they were asked for."""
    page = mmap.PAGESIZE
    start = -(-part.data_ptr() // page) * page
    end = (part.data_ptr() + part.nbytes) // page * page
    if end > start:
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
