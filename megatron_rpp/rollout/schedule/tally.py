"""The counters that the replicas of a job share while they sample a step, in the job's store."""

from __future__ import annotations

import torch.distributed as dist

from megatron_rpp.rollout.schedule.quota import Counts

_CHANGING = ("kept", "lost", "awaited", "tokens")
_ALL = (*_CHANGING, "taken", "failed")


class Tally:
    """One try's. Every replica makes its own on the same store and name, with the same `start`."""

    def __init__(self, store: dist.Store, name: str, start: Counts) -> None:
        """start: what earlier tries of the step have come to."""
        self._store = dist.PrefixStore(f"schedule/{name}", store)
        self._start = start
        for key in _ALL:
            self._store.add(key, 0)

    def take(self) -> int:
        """The number of the next group in the queue; no other replica gets the same."""
        return int(self._store.add("taken", 1)) - 1

    def add(self, **amounts: int) -> None:
        """Change counters, in the order that is given."""
        for key, amount in amounts.items():
            assert key in _CHANGING, key
            self._store.add(key, amount)

    def fail(self) -> None:
        """Let the others end this try."""
        self._store.add("failed", 1)

    def look(self) -> tuple[Counts, bool]:
        """(what all replicas have come to, whether one of them has failed)."""
        *values, failed = (int(value) for value in self._store.multi_get([*_CHANGING, "failed"]))
        found = {key: getattr(self._start, key) + value for key, value in zip(_CHANGING, values, strict=True)}
        return Counts(**found), failed > 0

    def forget(self) -> None:
        """Take the counters out of the store, once nobody uses them."""
        for key in _ALL:
            self._store.delete_key(key)
