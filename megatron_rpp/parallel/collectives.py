"""The few collectives the trainer needs, by what they mean."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rpp.parallel.context import ParallelContext

T = TypeVar("T")
Gather = Callable[[Any], list[Any]]
"""A rank's value -> those of every rank of the job, in rank order, as `gather_objects` does."""


def sum_over(group: ProcessGroup) -> Callable[[Tensor], Tensor]:
    """An all-reduce (sum) over `group` as a function of a tensor; the argument is left as it was."""
    return _all_reduce(group, dist.ReduceOp.SUM)


def max_over(group: ProcessGroup) -> Callable[[Tensor], Tensor]:
    """An all-reduce (maximum, of each element) over `group`, like `sum_over`."""
    return _all_reduce(group, dist.ReduceOp.MAX)


def _all_reduce(group: ProcessGroup, operation: dist.ReduceOp.RedOpType) -> Callable[[Tensor], Tensor]:
    def reduce(x: Tensor) -> Tensor:
        result = x.clone()
        dist.all_reduce(result, operation, group=group)
        return result

    return reduce


def from_replica_leader(parallel: ParallelContext, compute: Callable[[], T]) -> T:
    """Run `compute` on each replica's first rank and return its result on the whole replica.

    An exception there is raised on every rank of the replica, so that no rank waits for ever: as `portable` makes it.
    """
    outcome: tuple[T | None, Exception | None] = (None, None)
    if parallel.is_replica_leader:
        try:
            outcome = (compute(), None)
        except Exception as caught:
            outcome = (None, portable(caught))
    result, error = share(parallel.replica_group, outcome, source=0)
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def portable(error: Exception) -> Exception:
    """`error`, or its words where other ranks could not be sent it: not every library's exceptions can be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does there
        told = RuntimeError(words_of(error))
        told.__cause__ = error
        return told
    return error


def share(group: ProcessGroup, value: T | None, source: int) -> T:
    """Broadcast any picklable `value` from group rank `source`."""
    if group.size() == 1:
        return value  # type: ignore[return-value]
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=source)
    return box[0]  # type: ignore[return-value]


def share_tensors(
    group: ProcessGroup, tensors: dict[str, Tensor] | None, source: int, device: torch.device
) -> dict[str, Tensor]:
    """Broadcast named tensors from group rank `source`; the others pass None."""
    if group.size() == 1:
        assert tensors is not None
        return tensors
    shapes = share(group, {k: (v.shape, v.dtype) for k, v in tensors.items()} if tensors else None, source)
    received = tensors or {k: torch.empty(shape, dtype=dtype, device=device) for k, (shape, dtype) in shapes.items()}
    for name in shapes:
        dist.broadcast(received[name], group=group, group_src=source)
    return received


def gather_objects(value: T, group: ProcessGroup | None = None) -> list[T]:
    """Every rank's small `value`, in rank order, on every rank (the whole job where group is None)."""
    values: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def words_of(error: Exception, *expected: type[Exception]) -> str:
    """What the other ranks are told of `error`: one of the `expected` kinds speaks for itself, others by type."""
    return str(error) if isinstance(error, expected) else f"{type(error).__name__}: {error}"


def gather_errors(error: str | None, gather: Gather = gather_objects) -> str | None:
    """What went wrong on any rank of the job, by rank; None where nothing did. Every rank must call it."""
    found = [f"rank {rank}: {text}" for rank, text in enumerate(gather(error)) if text]
    return "; ".join(found) or None


def on_rank_0(
    action: Callable[[], None],
    *,
    expect: type[Exception] | tuple[type[Exception], ...] = OSError,
    raises: type[Exception] = OSError,
    gather: Gather = gather_objects,
) -> None:
    """Run `action` on rank 0 while the others wait. An `expect` there is raised on every rank as a `raises`."""
    error = None
    if dist.get_rank() == 0:
        try:
            action()
        except expect as caught:
            error = str(caught)
    if failed := gather_errors(error, gather):
        raise raises(failed)


class GatherShards(Protocol):
    """What `gather_shards` does, without its timeout."""

    def __call__(self, shard: Tensor, group: ProcessGroup, ranks: Sequence[int] | None = None) -> list[Tensor]: ...


def gather_shards(
    shard: Tensor, group: ProcessGroup, ranks: Sequence[int] | None = None, timeout: timedelta | None = None
) -> list[Tensor]:
    """The equally shaped shards of `ranks` of `group` (None: of all, in their order), end to end in one buffer.

    Every rank of the group calls it, and gets them; that of a rank which is not asked for gives its shape alone.
    timeout: RuntimeError past it, and the group is lost; None: the group's own.
    """
    if group.size() == 1:
        return [shard]
    sources = range(group.size()) if ranks is None else ranks
    whole = shard.new_empty((len(sources), *shard.shape))
    parts = list(whole.unbind())
    if ranks is not None or dist.get_backend(group) == "gloo":  # whose all-gather holds another copy of the whole
        works = []
        for rank, part in zip(sources, parts, strict=True):
            if rank == group.rank():
                part.copy_(shard)
            works.append(dist.broadcast(part, group=group, group_src=rank, async_op=True))
    else:
        works = [dist.all_gather_into_tensor(whole, shard.contiguous(), group=group, async_op=True)]
    for work in works:
        assert work is not None
        work.wait(timeout) if timeout else work.wait()
    return parts
