"""Changes come back bit for bit, whatever the dtype, and take little room."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rpp.rollout.in_server.delta_codec import decode, encode, integers, pack_bits, unpack_bits

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int64, torch.uint8]
SHAPES = [(), (0,), (1,), (7,), (8,), (65,), (3, 5), (2, 3, 11), (4, 0, 2)]


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Every bit pattern, so NaN with payloads, infinities, denormals and both zeros too."""
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def flip_some(tensor: Tensor, share: float, generator: torch.Generator) -> Tensor:
    where = torch.rand(tensor.shape, generator=generator) < share
    return torch.where(where, integers(tensor) ^ 1, integers(tensor)).view(tensor.dtype)


def patched(old: Tensor, blob: Tensor, new: Tensor) -> Tensor:
    """`old` after the change, with garbage wherever the change says that nothing was sent."""
    change = decode(blob, new.dtype, tuple(new.shape))
    assert change.values.shape == new.shape and change.values.dtype == new.dtype
    if change.changed is None:
        return change.values
    return torch.where(change.changed, integers(change.values), integers(old)).view(new.dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(integers(a), integers(b))


@settings(deadline=None)  # the machine may be busy
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from(SHAPES),
    share=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_a_change_gives_back_every_bit(dtype: torch.dtype, shape: tuple[int, ...], share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old = random_bits(dtype, shape, generator)
    new = flip_some(old, share, generator)
    blob = encode(old, new)
    assert same_bits(patched(old, blob, new), new)
    assert blob.numel() <= new.nbytes + 16
    assert (blob.numel() == 0) == same_bits(old, new)


@settings(deadline=None)  # the machine may be busy
@given(dtype=st.sampled_from(DTYPES), shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**31))
def test_a_tensor_without_a_base_comes_whole(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    new = random_bits(dtype, shape, torch.Generator().manual_seed(seed))
    change = decode(encode(None, new), dtype, shape)
    assert change.changed is None and same_bits(change.values, new)


@pytest.mark.parametrize("other", [torch.zeros(5), torch.zeros(4, dtype=torch.bfloat16)])
def test_a_base_of_another_shape_or_dtype_is_no_base(other: Tensor) -> None:
    assert decode(encode(other, torch.zeros(4)), torch.float32, (4,)).changed is None


def test_the_sign_of_zero_counts_and_nan_equals_itself() -> None:
    nan = float("nan")
    old = torch.tensor([0.0, nan, 1.0] + [2.0] * 61)
    new = torch.tensor([-0.0, nan, 1.0] + [2.0] * 61)
    change = decode(encode(old, new), torch.float32, (64,))
    assert change.changed is not None and change.changed.nonzero().tolist() == [[0]]
    assert torch.signbit(change.values[0])
    assert encode(new, new.clone()).numel() == 0


def test_nan_with_another_payload_is_a_change() -> None:
    bits = torch.full((64,), 0x7FC0, dtype=torch.int16)
    new = bits.clone()
    new[5] = 0x7FC1
    blob = encode(bits.view(torch.bfloat16), new.view(torch.bfloat16))
    assert torch.equal(integers(patched(bits.view(torch.bfloat16), blob, new.view(torch.bfloat16))), new)


def test_tensors_that_are_not_contiguous_are_compared_by_position() -> None:
    old = torch.arange(240.0).reshape(12, 20).t()  # [20, 12]
    new = old.contiguous()
    new[7, 3] = -1
    change = decode(encode(old, new), torch.float32, (20, 12))
    assert change.changed is not None and change.changed.nonzero().tolist() == [[7, 3]]
    assert encode(old[::2], new[::2]).numel() == 0  # row 7 is not among them


@pytest.mark.parametrize(("share", "at_most"), [(0.001, 0.012), (0.01, 0.03), (0.1, 0.18), (0.5, 0.58)])
def test_a_change_of_a_bf16_tensor_takes_little_more_than_its_values(share: float, at_most: float) -> None:
    generator = torch.Generator().manual_seed(3)
    old = torch.randn(100_000, generator=generator).bfloat16()
    blob = encode(old, flip_some(old, share, generator))
    assert blob.numel() < at_most * old.nbytes


@settings(deadline=None)  # the machine may be busy
@given(bits=st.lists(st.booleans(), max_size=70))
def test_bits_are_unpacked_as_they_were_packed(bits: list[bool]) -> None:
    packed = pack_bits(torch.tensor(bits, dtype=torch.bool))
    assert packed.numel() == -(-len(bits) // 8)
    assert unpack_bits(packed, len(bits)).tolist() == bits


def test_a_change_that_is_cut_off_or_of_another_tensor_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    old = random_bits(torch.bfloat16, (300,), generator)
    some, whole = encode(old, flip_some(old, 0.05, generator)), encode(None, old)
    for blob in (some[:-1], some[:20], some[:8], whole[:-2], torch.zeros_like(some)):
        with pytest.raises(ValueError):
            decode(blob, torch.bfloat16, (300,))
    for blob in (some, whole):
        with pytest.raises(ValueError):
            decode(blob, torch.bfloat16, (3000,))


def test_a_dtype_without_integers_of_its_size_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="complex128"):
        encode(None, torch.zeros(3, dtype=torch.complex128))


def test_the_loader_does_not_bring_the_trainer_into_a_server() -> None:
    """megatron_rpp.device changes torch for Megatron on CPU, which would change the server's sampling."""
    code = (
        "import sys, megatron_rpp.rollout.in_server.delta_loader\n"
        "bad = ('megatron', 'megatron_rpp.device', 'megatron_rpp.weight_sync', 'megatron_rpp.config', 'sglang')\n"
        "assert not [m for m in sys.modules if m in bad], [m for m in sys.modules if m in bad]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
