"""The CPU kernel of seeded sampling against a plain MurmurHash3."""

from __future__ import annotations

import importlib.util
import struct
from types import ModuleType

import pytest
import torch

from megatron_rpp.device import sglang_cpu


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0 of whole 4-byte blocks, in Python integers."""
    mask, h = 0xFFFFFFFF, 0
    for (k,) in struct.iter_unpack("<I", data):
        k = k * 0xCC9E2D51 & mask
        k = (k << 15 | k >> 17) & mask
        h ^= k * 0x1B873593 & mask
        h = ((h << 13 | h >> 19) & mask) * 5 + 0xE6546B64 & mask
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & mask
    h = (h ^ h >> 13) * 0xC2B2AE35 & mask
    return h ^ h >> 16


@pytest.fixture
def seeds() -> ModuleType:
    """The plugin's module, which only a server process has on its path."""
    path = sglang_cpu.python_path()[0] + "/rpp_sglang_cpu/seeds.py"
    spec = importlib.util.spec_from_file_location("seeds", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_murmurhash3() -> None:
    assert murmur3(b"\0\0\0\0") == 0x2362F9DE  # a published test vector


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**63 - 1])
def test_hash_of_seed_position_and_column(seeds: ModuleType, seed: int) -> None:
    positions, columns = torch.tensor([5, 70_000]), torch.tensor([0, 3, 151_935])
    got = seeds.murmur_hash32(torch.tensor([seed, seed]).to(torch.uint64), positions, columns)
    expected = [[murmur3(struct.pack("<QII", seed, p, c)) for c in columns.tolist()] for p in positions.tolist()]
    assert got.tolist() == expected
