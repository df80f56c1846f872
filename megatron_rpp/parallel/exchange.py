"""Small values between all ranks through the job's key-value store, with a deadline that names who is missing.

A collective of a process group can neither be given up nor say which rank it waits for, and a group that
has timed out is lost. The store is neither.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

GRACE_S = 5.0
"""For rank 0's answer, beside its own wait for the others, which may begin a whole timeout later."""


class OutOfStep(RuntimeError):
    """The ranks of a job are not where they should be, so that it cannot go on."""


class RanksMissing(OutOfStep):
    """Ranks did not answer in time; they may yet come."""

    def __init__(self, what: str, ranks: Sequence[int], waited_s: float) -> None:
        names = ", ".join(map(str, ranks))
        super().__init__(f"{what}: rank {names} did not answer within {waited_s:g} s")
        self.ranks = tuple(ranks)


class Exchange:
    """All ranks make the same calls in the same order."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, name: str) -> None:
        """name: a prefix of its keys; two exchanges on one store need two names."""
        self._store = dist.PrefixStore(f"exchange/{name}", store)
        self._rank, self._world_size = rank, world_size
        self._calls = 0

    def gather(self, what: str, value: T, timeout_s: float) -> list[T]:
        """Every rank's picklable `value`, in rank order, on every rank.

        what: names the occasion; it must be the same on all. Raises RanksMissing or OutOfStep on every rank
        that is there.
        """
        self._calls += 1
        patience_s = 2 * timeout_s + GRACE_S
        try:
            self._store.set(self._key(self._rank), pickle.dumps((what, value)))  # type: ignore[arg-type] # takes bytes
            if self._rank == 0:
                self._publish(timeout_s)
            answer = f"{self._calls}/all"
            self._store.wait([answer], timedelta(seconds=patience_s))
            missing, packed = pickle.loads(self._store.get(answer))
        except dist.DistError as error:  # in time, or because the store has died with rank 0
            raise RanksMissing(what, [0], patience_s) from error
        if missing:
            raise RanksMissing(what, missing, timeout_s)
        told = [pickle.loads(each) for each in packed]
        if any(other != what for other, _ in told):
            places = ", ".join(f"rank {rank}: {other}" for rank, (other, _) in enumerate(told))
            raise OutOfStep(f"the ranks are at different places: {places}")
        return [each for _, each in told]

    def _publish(self, timeout_s: float) -> None:
        """On rank 0: put all values, or the ranks that are missing, under one key."""
        keys = [self._key(rank) for rank in range(self._world_size)]
        missing: list[int] = []
        try:
            self._store.wait(keys, timedelta(seconds=timeout_s))
        except dist.DistStoreError:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
        values = [] if missing else self._store.multi_get(keys)
        self._store.set(f"{self._calls}/all", pickle.dumps((missing, values)))  # type: ignore[arg-type]
        for key in keys:
            self._store.delete_key(key)
        self._store.delete_key(f"{self._calls - 1}/all")  # everyone who is in this call has read it

    def _key(self, rank: int) -> str:
        return f"{self._calls}/{rank}"
