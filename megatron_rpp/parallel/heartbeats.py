"""Heartbeats of a job's ranks in its key-value store, and who of them is lost."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron_rpp.parallel.failures import Failure

RUNS, DONE, SEEN = "runs", "done", "seen"
"""States of a rank: at work; at its end; knows the verdict."""
OVER = "over"
"""A verdict's kind where every rank has come to its end."""
JOIN_S = 300.0
"""All ranks have just met in the bootstrap, so that one that does not come has died since."""
ANSWER_S = 3.0
"""After an alarm every rank beats at once; who is later than this, and was silent for an interval before, is lost."""


@dataclass(frozen=True)
class Beat:
    """A rank's last sign of life; `count` changes with each."""

    count: int
    state: str
    host: str


class Board:
    """What the ranks tell each other. For one thread, since a call may block where the store's host is suspended."""

    def __init__(self, store: dist.Store, rank: int, host: str) -> None:
        # A client of its own: another thread's blocking wait holds the lock of a shared one.
        self._store = dist.PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined] # not in torch's stubs
        self._rank, self._host, self._count = rank, host, 0

    def join(self, world_size: int) -> None:
        """The first beat of everybody; reading one that is missing would block. Returns when all are there."""
        self.beat(RUNS)
        self._store.wait([f"beat/{rank}" for rank in range(world_size)], timedelta(seconds=JOIN_S))

    def beat(self, state: str) -> None:
        self._count += 1
        self._store.set(f"beat/{self._rank}", json.dumps([self._count, state, self._host]))

    def beats(self, ranks: Collection[int]) -> dict[int, Beat]:
        """The last beats of `ranks`."""
        values = self._store.multi_get([f"beat/{rank}" for rank in ranks])
        return {rank: Beat(*json.loads(value)) for rank, value in zip(ranks, values, strict=True)}

    def declare(self, verdict: Failure) -> Failure:
        """Make `verdict` the job's, unless it has one; returns the job's."""
        return _verdict(self._store.compare_set("verdict", "", json.dumps(asdict(verdict))))

    def raise_alarm(self) -> None:
        """A rank's collective broke: somebody must be gone, and the others are to say that they live."""
        self._store.set("alarm", "")

    def is_alarmed(self) -> bool:
        return self._store.check(["alarm"])

    def verdict(self) -> Failure | None:
        """Why the job ends, once it does."""
        return _verdict(self._store.get("verdict")) if self._store.check(["verdict"]) else None


def _verdict(value: bytes) -> Failure:
    return Failure.from_json(json.loads(value))


class Judge:
    """Measures how long each rank has been silent, by this rank's own clock."""

    def __init__(self, deadline_s: float, interval_s: float) -> None:
        """interval_s: between the beats of a rank."""
        self._deadline_s, self._interval_s = deadline_s, interval_s
        self._last: dict[int, Beat] = {}
        self._silent_s: dict[int, float] = {}

    def lost(self, beats: Mapping[int, Beat], elapsed_s: float, *, is_alarmed: bool) -> tuple[list[int], float]:
        """(the ranks that are lost, the seconds that the first of them was silent) `elapsed_s` after the last look.

        The longest silent comes first. The ranks of a dead host may have been up to one interval apart.
        """
        # A judge that was itself held up has not listened in that time.
        heard_s = min(elapsed_s, 2 * self._interval_s)
        for rank, beat in beats.items():
            moved = self._last.get(rank) != beat
            self._silent_s[rank] = 0.0 if moved else self._silent_s[rank] + heard_s
            self._last[rank] = beat
        limit_s = min(self._deadline_s, self._interval_s + ANSWER_S) if is_alarmed else self._deadline_s
        longest_s = max(self._silent_s.values(), default=0.0)
        if longest_s <= limit_s:
            return [], 0.0
        by_silence = sorted(self._silent_s.items(), key=lambda item: (-item[1], item[0]))
        return [rank for rank, silent_s in by_silence if silent_s > longest_s - 1.5 * self._interval_s], longest_s


def lost_hosts(lost: Collection[int], beats: Mapping[int, Beat]) -> tuple[str, ...]:
    """Hosts all of whose ranks are among the `lost`."""
    alive = {beat.host for rank, beat in beats.items() if rank not in lost}
    return tuple(sorted({beats[rank].host for rank in lost if rank in beats} - alive - {""}))
