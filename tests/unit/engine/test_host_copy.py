"""Tensors leave their memory and come back as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_rpp.engine import host_copy
from megatron_rpp.engine.host_copy import HostCopy


@pytest.fixture
def tensors() -> list[Tensor]:
    """A buffer with two views of it, a parameter of another type, one without elements."""
    whole = torch.arange(700, dtype=torch.float32)
    parameter = torch.nn.Parameter(torch.randn(33, 7, dtype=torch.bfloat16))
    return [whole, whole[:100], whole[100:].view(20, 30).t(), parameter, torch.empty(0)]


def sizes(tensors: list[Tensor]) -> list[int]:
    return [tensor.untyped_storage().size() for tensor in tensors]


@pytest.mark.parametrize("block_bytes", [64, 1000, 1 << 20])
def test_views_and_parameters_come_back_bit_for_bit(tensors: list[Tensor], block_bytes: int) -> None:
    before, copy = [tensor.clone() for tensor in tensors], HostCopy(block_bytes)
    for _ in range(2):
        copy.take(tensors)
        assert sizes(tensors) == [0] * 5 and copy.nbytes == 700 * 4 + 33 * 7 * 2
        copy.give_back()
        assert copy.nbytes == 0
        assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


def test_the_second_time_no_host_memory_is_allocated(tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    copy = HostCopy(1000)
    copy.take(tensors)
    copy.give_back()
    monkeypatch.setattr(host_copy, "host_block", lambda size: pytest.fail("the blocks are there"))
    tensors[0][0] = -1.0  # the second copy is of the second values
    copy.take(tensors)
    copy.give_back()
    assert tensors[1][0] == -1.0


def test_too_little_host_memory_leaves_all_tensors_whole(
    tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(size: int) -> Tensor:
        raise RuntimeError("out of host memory")

    before = sizes(tensors)
    monkeypatch.setattr(host_copy, "host_block", none_left)
    copy = HostCopy(1000)
    with pytest.raises(RuntimeError, match="out of host memory"):
        copy.take(tensors)
    assert sizes(tensors) == before and copy.nbytes == 0


def test_too_little_device_memory_loses_nothing_that_is_on_the_host(
    tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, copy, pieces = [tensor.clone() for tensor in tensors], HostCopy(1000), HostCopy._pieces
    copy.take(tensors)

    def second_fails(self: HostCopy, storage: object, size: int, start: int) -> object:
        if start == 0:  # what was taken first comes back last
            raise RuntimeError("out of memory")
        return pieces(self, storage, size, start)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(HostCopy, "_pieces", second_fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            copy.give_back()
    assert torch.equal(tensors[3], before[3]) and copy.nbytes == 700 * 4
    copy.give_back()
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
