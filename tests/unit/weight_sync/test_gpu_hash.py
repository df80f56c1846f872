"""The hash of SGLang's weight checker on GPUs, against its words and arithmetic one at a time in plain integers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from megatron_rpp.weight_sync import gpu_hash
from megatron_rpp.weight_sync.digests import new_digest
from megatron_rpp.weight_sync.gpu_hash import TILE_BYTES, GpuHash

M32, M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
SEEDS = (0x243F6A88, 0x243F6A88 * 0x9E3779B1 & M32 ^ 0xDEADBEEF)


def mixed(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B & M32
    x ^= x >> 13
    x = x * 0xC2B2AE35 & M32
    return x ^ x >> 16


def turned(x: int, bits: int) -> int:
    return (x << bits | x >> 32 - bits) & M32


def plain(tensor: Tensor) -> str:
    """As sglang/kernels/ops/memory/gpu_tensor_hash.py computes it, a word at a time."""
    data = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
    data += bytes(-len(data) % 4)
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    total = 0
    for tile in range(0, len(words), 8192):
        first = second = 0
        for i in range(tile, min(tile + 8192, len(words))):
            first += mixed(words[i] ^ (i * 0x27D4EB2D + SEEDS[0] & M32) ^ turned(i, 15))
            second += mixed(words[i] ^ (i * 0x165667B1 + SEEDS[1] & M32) ^ turned(i, 13))
        length = 4 * len(words) & M32
        total += mixed(first & M32 ^ length) << 32 | mixed(second & M32 ^ length)
    x = total & M64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M64
    return f"{x ^ x >> 31 if words else 0:016x}"


def digest(*pieces: Tensor) -> str:
    made = new_digest("cuda")
    for piece in pieces:
        made.update(piece)
    return made.finish()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8191, 8192, 8193, 16384, 20001])
def test_a_tensor_of_words_has_the_hash_of_the_plain_port(size: int) -> None:
    tensor = torch.randn(size)
    assert digest(tensor) == plain(tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(65, 127).bfloat16(),  # an odd number of halves of words
        torch.randn(33, 3).to(torch.float8_e4m3fn),  # 99 bytes
        torch.randn(5, 7).double(),
        torch.randint(-9, 9, (129,), dtype=torch.int8),
        torch.tensor([True, False, True]),
        torch.randn(()),
        torch.full((40,), -0.0),
        torch.zeros(0),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_bytes_that_fill_no_word_are_followed_by_zeros(tensor: Tensor) -> None:
    assert digest(tensor) == plain(tensor)


def test_a_tensor_is_hashed_in_the_order_of_its_indices_not_of_its_memory() -> None:
    whole = torch.randn(40, 60).bfloat16()
    for view in (whole.T, whole[:, 1::3], whole[1:, 5:8], whole.reshape(-1)[1:]):
        assert digest(view) == plain(view)


@pytest.mark.parametrize("slab_tiles", [1, 2, 512])
def test_pieces_of_any_size_have_the_hash_of_the_whole(monkeypatch: pytest.MonkeyPatch, slab_tiles: int) -> None:
    monkeypatch.setattr(gpu_hash, "_SLAB_BYTES", slab_tiles * TILE_BYTES)
    whole = torch.randn(60_001).bfloat16()  # 3.7 tiles
    cuts = [1, 3, 16_384, 16_387, 50_000]
    assert digest(*whole.tensor_split(cuts)) == plain(whole)
    assert digest(whole) == plain(whole)


def test_no_more_than_a_slab_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_hash, "_SLAB_BYTES", 2 * TILE_BYTES)
    made = GpuHash()
    for _ in range(20):
        made.update(torch.randn(7000))
        held = sum(piece.untyped_storage().nbytes() for piece in made._waiting)
        assert held < 2 * TILE_BYTES and held == made._held


def test_one_bit_or_two_exchanged_words_change_the_hash() -> None:
    tensor = torch.randn(9000)
    flipped, exchanged = tensor.clone(), tensor.clone()
    flipped.view(torch.int32)[8500] ^= 1
    exchanged[[0, 8999]] = exchanged[[8999, 0]]
    assert len({digest(tensor), digest(flipped), digest(exchanged)}) == 3


def test_an_index_above_two_to_the_31_wraps_as_the_kernels_does() -> None:
    words = torch.randint(-(2**31), 2**31, (4,), dtype=torch.int32)
    first, (seed, factor, turn) = 2**31 - 2, gpu_hash._HALVES[1]
    found = int(gpu_hash._tile_sums(words, first, seed, factor, turn)) & M32
    expected = sum(
        mixed(word & M32 ^ (i * factor + seed & M32) ^ turned(i, turn))
        for i, word in enumerate(words.tolist(), start=first)
    )
    assert found == expected & M32


def test_servers_on_gpus_are_verified_where_sglang_cannot_be_imported() -> None:
    program = (
        "import sys, torch; sys.modules['sglang'] = sys.modules['triton'] = None\n"
        "from megatron_rpp.weight_sync.digests import new_digest\n"
        "digest = new_digest('cuda'); digest.update(torch.arange(10.0)); print(digest.finish())"
    )
    ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    assert ended.stdout.split()[-1] == plain(torch.arange(10.0))
