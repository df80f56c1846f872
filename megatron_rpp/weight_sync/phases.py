"""The phases of a sync: what one rank does, all ranks learn the end of, by a deadline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rpp.parallel.collectives import gather_shards, words_of
from megatron_rpp.parallel.exchange import Exchange, OutOfStep
from megatron_rpp.rollout.fleet import Server
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.weight_sync.threads import in_thread
from megatron_rpp.weight_sync.transport import (
    RAISE_DEADLINE,
    Deadline,
    Failure,
    OutOfStepError,
    ServerFailure,
    WeightSyncError,
)

T = TypeVar("T")
_NUMBERS = count()  # all ranks make their Phases in the same order


class Phases:
    """All ranks of the job call `run` alike."""

    def __init__(self, store: dist.Store, deadline_s: float) -> None:
        name = f"weight-sync-{next(_NUMBERS)}"
        self._exchange = Exchange(store, dist.get_rank(), dist.get_world_size(), name)
        self._deadline_s = deadline_s
        self._lost: str | None = None  # the group whose ranks are no longer at the same gather

    def deadline(self, phase: str) -> Deadline:
        """Of a phase that begins now."""
        return Deadline(phase, self._deadline_s)

    def run(self, deadline: Deadline, action: Callable[[Deadline], T] | None = None) -> list[T | None]:
        """Run `action` on the ranks that pass one; its results, in rank order, on every rank.

        Raises WeightSyncError on every rank where it failed on any, OutOfStepError where ranks are missing or
        a group of ranks is lost.
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
        outcomes = self.gather(deadline, (value, failures, self._lost))
        found = [failure for _, of_rank, _ in outcomes for failure in of_rank]
        words = "; ".join(map(str, found))
        if lost := [group for _, _, group in outcomes if group]:
            raise OutOfStepError(f"{lost[0]}; {words}", found)
        if found:
            raise WeightSyncError(words, found)
        return [result for result, _, _ in outcomes]

    def gather(self, deadline: Deadline, value: Any) -> list[Any]:
        """Every rank's `value`. OutOfStepError where ranks do not come.

        It waits past the deadline by half of it: a rank that has used all its time finishes its gathers first.
        """
        try:
            return self._exchange.gather(f"phase {deadline.phase}", value, deadline.left_s() + deadline.seconds / 2 + 2)
        except OutOfStep as error:
            hint = f"; {RAISE_DEADLINE}" if dist.get_rank() == 0 else ""
            raise OutOfStepError(f"{error}{hint}") from error

    def gather_shards(
        self, deadline: Deadline, shard: Tensor, group: ProcessGroup, ranks: Sequence[int] | None = None
    ) -> list[Tensor]:
        """As in collectives. Past the deadline and a quarter of it the group is lost, and with it the job.

        Not at the deadline: a rank that a server keeps waiting until then has yet to come to its gathers.
        """
        timeout = timedelta(seconds=deadline.left_s() + deadline.seconds / 4)
        try:
            return gather_shards(shard, group, ranks, timeout)
        except RuntimeError as error:
            # Its ranks may now be at different parameters: another gather could join wrong shards, unseen.
            self._lost = f"a gather over ranks {dist.get_process_group_ranks(group)} has failed: {error}"
            raise


def for_each_server(servers: Sequence[Server], action: Callable[[Server, Deadline], None], deadline: Deadline) -> None:
    """Run `action` for all at once, each to its end. Raises an ExceptionGroup of ServerFailures."""
    running = [(server, in_thread(action, server, deadline)) for server in servers]
    failures = []
    for server, future in running:
        try:
            future.result()
        except ServerFailure as failure:
            failures.append(failure)
        except RolloutError as error:
            failures.append(ServerFailure(server.url, str(error)))
    if failures:
        raise ExceptionGroup("servers failed", failures)


def _failure(phase: str, error: Exception) -> Failure:
    if isinstance(error, ServerFailure):
        return Failure(phase, dist.get_rank(), str(error), error.server, error.tensors)
    return Failure(phase, dist.get_rank(), words_of(error, OSError, ValueError, RuntimeError))
