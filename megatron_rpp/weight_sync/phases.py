"""The phases of a sync: what one rank does, all ranks learn the end of, by a deadline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_rpp.parallel.exchange import Exchange, RanksMissing
from megatron_rpp.rollout.fleet import Server
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.weight_sync.transport import Deadline, Failure, OutOfStepError, ServerFailure, WeightSyncError

T = TypeVar("T")
_NUMBERS = count()  # all ranks make their Phases in the same order


class Phases:
    """All ranks of the job call `run` alike."""

    def __init__(self, store: dist.Store, deadline_s: float) -> None:
        name = f"weight-sync-{next(_NUMBERS)}"
        self._exchange = Exchange(store, dist.get_rank(), dist.get_world_size(), name)
        self._deadline_s = deadline_s

    def deadline(self, phase: str) -> Deadline:
        """Of a phase that begins now."""
        return Deadline(phase, self._deadline_s)

    def run(self, deadline: Deadline, action: Callable[[Deadline], T] | None = None) -> list[T | None]:
        """Run `action` on the ranks that pass one; its results, in rank order, on every rank.

        Raises WeightSyncError on every rank where it failed on any, OutOfStepError where ranks are missing.
        """
        value, failures = None, []
        try:
            value = action(deadline) if action is not None else None
        except ExceptionGroup as group:
            failures = [_failure(deadline.phase, error) for error in group.exceptions]
        except OutOfStepError:
            raise
        except Exception as error:  # whatever it is: the other ranks wait to hear of it
            failures = [_failure(deadline.phase, error)]
        outcomes = self.gather(deadline, (value, failures))
        if found := [failure for _, of_rank in outcomes for failure in of_rank]:
            raise WeightSyncError("; ".join(map(str, found)), found)
        return [result for result, _ in outcomes]

    def gather(self, deadline: Deadline, value: Any) -> list[Any]:
        """Every rank's `value`. OutOfStepError where ranks do not come before the deadline."""
        try:
            return self._exchange.gather(f"phase {deadline.phase}", value, deadline.left_s() + _grace_s(deadline))
        except RanksMissing as error:
            raise OutOfStepError(str(error)) from error


def for_each_server(servers: Sequence[Server], action: Callable[[Server, Deadline], None], deadline: Deadline) -> None:
    """Run `action` for all at once, each to its end. Raises an ExceptionGroup of ServerFailures."""

    def one(server: Server) -> ServerFailure | None:
        try:
            action(server, deadline)
        except RolloutError as error:
            return ServerFailure(server.url, str(error))
        except ServerFailure as failure:
            return failure
        return None

    with ThreadPoolExecutor(max(len(servers), 1)) as pool:
        failures = [failure for failure in pool.map(one, servers) if failure is not None]
    if failures:
        raise ExceptionGroup("servers failed", failures)


def _grace_s(deadline: Deadline) -> float:
    """A rank that has used its whole deadline still has to say so."""
    return min(2.0, deadline.seconds)


def _failure(phase: str, error: Exception) -> Failure:
    if isinstance(error, ServerFailure):
        return Failure(phase, dist.get_rank(), str(error), error.server, error.tensors)
    is_expected = isinstance(error, RolloutError | OSError | ValueError | RuntimeError)
    return Failure(phase, dist.get_rank(), str(error) if is_expected else f"{type(error).__name__}: {error}")
