"""Servers announce themselves in the job's key-value store; rank 0's fleet reads who is there.

Every announcement takes a slot of its own, numbered by a counter, since a store cannot list its keys. A server
that has been started again takes a new one, so that nobody mistakes it for the process that was at its URL before.

    slots      how many have been taken
    N/entry    JSON of an Entry
    N/beat     counts up as long as the server lives
    N/gone     set once it has left; the slot is never used again
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import torch.distributed as dist

_PREFIX = "rollout-servers"


@dataclass(frozen=True)
class Entry:
    """A server that has announced itself."""

    slot: int  # from 1 on; a server that has been started again at its URL has another
    url: str  # base URL, without a slash at its end
    host: str  # name of the server's host


class Announcement:
    """A server's own hold on its slot."""

    def __init__(self, store: dist.Store, slot: int) -> None:
        self._store, self._slot = store, slot

    def renew(self) -> None:
        """It lives. Raises torch's DistError where the store is gone."""
        self._store.add(f"{self._slot}/beat", 1)

    def withdraw(self) -> None:
        """It serves no more. Raises torch's DistError where the store is gone."""
        self._store.set(f"{self._slot}/gone", "1")


class Registry:
    """The announcements of one start of a job. One thread uses it; a reader keeps what it has seen."""

    def __init__(self, store: dist.Store, attempt: str, beat_deadline_s: float) -> None:
        """attempt: names this start of the job; announcements for another are not seen.

        beat_deadline_s: an entry whose beat has not moved for so long, by the reader's clock, is left out.
        """
        self._store = dist.PrefixStore(f"{_PREFIX}/{attempt}", store)
        self._beat_deadline_s = beat_deadline_s
        self._entries: dict[int, Entry] = {}
        self._gone: set[int] = set()
        self._beats: dict[int, tuple[int, float]] = {}  # slot -> (beat, monotonic seconds when it was first seen)

    def announce(self, url: str, host: str) -> Announcement:
        """The server at `url` is healthy. Raises torch's DistError where the store is gone."""
        slot = self._store.add("slots", 1)
        self._store.set(f"{slot}/entry", json.dumps({"url": url.rstrip("/"), "host": host}))
        announcement = Announcement(self._store, slot)
        announcement.renew()
        return announcement

    def entries(self) -> tuple[Entry, ...]:
        """Who is there, in the order of announcement; of one URL the newest alone."""
        slots = range(1, self._store.add("slots", 0) + 1)
        here = [entry for slot in slots if (entry := self._entry(slot)) is not None and self._is_alive(slot)]
        newest = {entry.url: entry for entry in here}
        return tuple(entry for entry in here if newest[entry.url] is entry)

    def _entry(self, slot: int) -> Entry | None:
        """None where it has left, or has its number and is about to write the rest."""
        if slot in self._gone:
            return None
        if self._store.check([f"{slot}/gone"]):
            self._gone.add(slot)
            return None
        if slot not in self._entries:
            if not self._store.check([f"{slot}/entry"]):
                return None
            self._entries[slot] = Entry(slot, **json.loads(self._store.get(f"{slot}/entry")))
        return self._entries[slot]

    def _is_alive(self, slot: int) -> bool:
        now, beat = time.monotonic(), self._store.add(f"{slot}/beat", 0)
        if slot not in self._beats or self._beats[slot][0] != beat:
            self._beats[slot] = (beat, now)
        return now - self._beats[slot][1] <= self._beat_deadline_s
