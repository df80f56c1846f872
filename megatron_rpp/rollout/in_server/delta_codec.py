"""What changed from one tensor to another, bit for bit, in few bytes.

Nothing changed: no bytes. Otherwise a header of two int64 (kind, number of changed values), then for
- SOME: the changed values in order, padded to 8 bytes; then which they are, as a bit mask of which only the
  bytes that are not zero are sent, behind a second bit mask that says which bytes those are.
- ALL: every value. Chosen where it is smaller, and where there is nothing to compare with.

A 1 % change of a bfloat16 tensor takes 2.3 % of its size; the mask alone would take 6 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SOME, ALL = 1, 2
_HEADER_BYTES = 16
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes a value


@dataclass(frozen=True)
class Change:
    """A decoded blob."""

    values: Tensor  # in the tensor's shape and dtype; zero bits where `changed` is False
    changed: Tensor | None  # bool, of the same shape and strides; None: everything


def encode(old: Tensor | None, new: Tensor) -> Tensor:
    """What turns `old` into `new`, as bytes [n] uint8, on the device of both.

    Values are compared by their bits, so that NaN equals itself and -0.0 is not 0.0. An `old` that is None or
    of another shape or dtype is as good as none.
    Raises ValueError for a dtype without integers of its size.
    """
    bits = _as_integers(new)
    if old is None or old.shape != new.shape or old.dtype != new.dtype:
        return _all(bits)
    changed = bits.ne(_as_integers(old))
    mask = pack_bits(changed)
    is_used = mask.ne(0)
    number, used_bytes = int(changed.sum()), int(is_used.sum())
    if number == 0:
        return mask.new_empty(0)
    size = _HEADER_BYTES + _padded(number * new.itemsize) + -(-mask.numel() // 8) + used_bytes
    if size >= _HEADER_BYTES + new.nbytes:
        return _all(bits)
    values = _pad(bits[changed].view(torch.uint8), _padded(number * new.itemsize))
    return torch.cat([_header(SOME, number, new.device), values, pack_bits(is_used), mask[is_used]])


def decode(blob: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Change:
    """The change in `blob` [n] uint8 (it must start at a multiple of 8 bytes) of a tensor of this dtype and shape.

    Where nothing changed, the tensors are expanded from one value and take no memory.
    Raises ValueError where the bytes cannot be such a change.
    """
    kind, count = _integer_of(dtype), torch.Size(shape).numel()
    if blob.numel() == 0:
        nothing = torch.zeros(1, dtype=kind, device=blob.device)
        return Change(nothing.view(dtype).expand(count).view(shape), nothing.bool().expand(count).view(shape))
    if blob.numel() < _HEADER_BYTES:
        raise ValueError(f"a change of {blob.numel()} bytes is cut off")
    mode, number = blob[:_HEADER_BYTES].view(torch.int64).tolist()
    body = blob[_HEADER_BYTES:]
    if mode == ALL and number == count and body.numel() == count * dtype.itemsize:
        return Change(body.view(dtype).view(shape), None)
    if mode != SOME or not 0 < number <= count:
        raise ValueError(f"{blob.numel()} bytes are no change of {dtype} {list(shape)}: kind {mode}, {number} values")
    padded = _padded(number * dtype.itemsize)
    changed = _unpack_mask(body[padded:], count)
    if int(changed.sum()) != number:
        raise ValueError(f"the mask of {dtype} {list(shape)} does not mark the {number} values that came with it")
    values = torch.zeros(count, dtype=kind, device=blob.device)
    values[changed] = body[: number * dtype.itemsize].view(kind)
    return Change(values.view(dtype).view(shape), changed.view(shape))


def pack_bits(bits: Tensor) -> Tensor:
    """bits [n] bool, eight to a byte, the first lowest: [ceil(n / 8)] uint8."""
    padded = _pad(bits.view(torch.uint8), -(-bits.numel() // 8) * 8)
    packed = padded[::8].clone()
    for place in range(1, 8):
        packed |= padded[place::8] << place
    return packed


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits of `packed`: [count] bool. Inverse of `pack_bits`."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return packed.unsqueeze(1).bitwise_right_shift(places).bitwise_and_(1).flatten()[:count].bool()


def integers(tensor: Tensor) -> Tensor:
    """The bits of `tensor` as integers: a view of its shape and strides. Raises ValueError for other sizes."""
    return tensor.view(_integer_of(tensor.dtype))


def _unpack_mask(body: Tensor, count: int) -> Tensor:
    """[count] bool, from a mask whose zero bytes were left out."""
    mask_bytes = -(-count // 8)
    where_bytes = -(-mask_bytes // 8)
    is_used = unpack_bits(body[:where_bytes], mask_bytes)
    used = body[where_bytes:]
    if is_used.numel() != mask_bytes or int(is_used.sum()) != used.numel():
        raise ValueError(f"a mask of {count} bits is cut off or too long")
    mask = torch.zeros(mask_bytes, dtype=torch.uint8, device=body.device)
    mask[is_used] = used
    return unpack_bits(mask, count)


def _as_integers(tensor: Tensor) -> Tensor:
    return integers(tensor.detach().contiguous().view(-1))


def _integer_of(dtype: torch.dtype) -> torch.dtype:
    if dtype.itemsize not in _INTEGER:
        raise ValueError(f"{dtype} cannot be sent as a change")
    return _INTEGER[dtype.itemsize]


def _all(bits: Tensor) -> Tensor:
    return torch.cat([_header(ALL, bits.numel(), bits.device), bits.view(torch.uint8)])


def _header(kind: int, number: int, device: torch.device) -> Tensor:
    return torch.tensor([kind, number], dtype=torch.int64).view(torch.uint8).to(device)


def _padded(size: int) -> int:
    """`size` bytes, up to the next multiple of 8."""
    return -(-size // 8) * 8


def _pad(data: Tensor, size: int) -> Tensor:
    """data [n] uint8 with zeros behind it: [size]."""
    return data if data.numel() == size else torch.cat([data, data.new_zeros(size - data.numel())])
