"""What weight_sync/broadcast.py takes from gloo: a broadcast that has ended had been asked for by all."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

LONG_ENOUGH_S = 0.3  # for what should not come


def start(group: dist.ProcessGroupGloo) -> dist.Work:
    """Send or receive four bytes, which any socket would hold."""
    return group.broadcast([torch.zeros(1)], dist.BroadcastOptions())


@pytest.mark.parametrize("receivers", [1, 2])
def test_a_small_tensor_is_not_sent_before_each_of_two_receivers_has_asked_for_it(receivers: int) -> None:
    """Else a server's next request could overtake one that it has not taken up."""
    store, size = dist.HashStore(), receivers + 1
    join: Callable[[int], dist.ProcessGroupGloo] = lambda rank: dist.ProcessGroupGloo(  # noqa: E731
        store, rank, size, timedelta(seconds=30)
    )
    with ThreadPoolExecutor(size) as threads:
        sender, *others = threads.map(join, range(size))
    sent = start(sender)
    for other in others:
        time.sleep(LONG_ENOUGH_S)
        assert not sent.is_completed()
        start(other).wait()
    sent.wait()
    assert sent.is_completed()
