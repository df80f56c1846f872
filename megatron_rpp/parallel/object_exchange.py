"""Python objects from every rank of a group to every other: only what is sent travels."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rpp.parallel.collectives import gather_objects

T = TypeVar("T")


def gather_outcomes(compute: Callable[[], T], group: ProcessGroup) -> list[T]:
    """What `compute` returns on each rank of `group`, in rank order; small.

    Raises RuntimeError on every one of them where any of them has an exception, so that none waits for it.
    """
    result, error, caught = None, None, None
    try:
        result = compute()
    except Exception as failure:
        caught, error = failure, f"rank {dist.get_rank()}: {type(failure).__name__}: {failure}"
    outcomes = gather_objects((result, error), group)
    if failed := "; ".join(text for _, text in outcomes if text):
        raise RuntimeError(failed) from caught
    return [found for found, _ in outcomes]  # type: ignore[misc] # None stands beside an error only


def exchange_objects(outgoing: Mapping[int, Any], group: ProcessGroup, device: torch.device) -> dict[int, Any]:
    """`outgoing[rank]` to that rank of `group`; returns what came, by the rank that it came from.

    A collective over `group`, through tensors on `device`. An exception on one rank is raised on all, as by
    `gather_outcomes`.
    """
    payloads: dict[int, bytes] = {}

    def sizes() -> list[int]:
        payloads.update({rank: pickle.dumps(value) for rank, value in outgoing.items()})
        return [len(payloads.get(rank, b"")) for rank in range(group.size())]

    coming = [of_rank[group.rank()] for of_rank in gather_outcomes(sizes, group)]
    parts = [payloads.get(rank, b"") for rank in range(group.size())]
    sent = torch.frombuffer(bytearray(b"".join(parts)) or bytearray(1), dtype=torch.uint8)
    going = [len(part) for part in parts]
    received = torch.empty(sum(coming), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, sent[: sum(going)].to(device), coming, going, group=group)
    found: dict[int, Any] = {}
    gather_outcomes(lambda: found.update(_unpickled(received.cpu(), coming)), group)
    return found


def _unpickled(received: Tensor, sizes: list[int]) -> dict[int, Any]:
    ends = list(accumulate(sizes))
    pieces = {rank: received[end - size : end] for rank, (end, size) in enumerate(zip(ends, sizes, strict=True))}
    return {rank: pickle.loads(piece.numpy().tobytes()) for rank, piece in pieces.items() if len(piece)}
