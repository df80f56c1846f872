"""Models without memory: the device layer answers with the meta device inside, and only there."""

from __future__ import annotations

import pytest
import torch

from megatron_rpp import device


def test_inside_the_device_is_meta_and_outside_it_is_what_it_was() -> None:
    before = device.current(), device.has_cuda()
    with device.without_memory():
        assert device.current() == torch.device("meta") and not device.has_cuda()
        assert torch.empty(1 << 50).is_meta
    assert (device.current(), device.has_cuda()) == before
    assert not torch.empty(1).is_meta


def test_an_error_inside_gives_the_device_back() -> None:
    with pytest.raises(RuntimeError, match="inside"), device.without_memory():
        raise RuntimeError("inside")
    assert device.current().type != "meta"
