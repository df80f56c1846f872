"""Waits that double."""

from __future__ import annotations

import time

_LONGEST_S = 60.0
_TIMES_LOST = 20.0  # so that what fails for ever costs a twentieth of the time at most


class Backoff:
    """Says when to try again: after first_s, then twice as long each time, up to a minute or 20 times what it cost."""

    def __init__(self, first_s: float) -> None:
        self._first_s = self._next_s = first_s
        self._due = 0.0  # monotonic seconds

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self._due

    def failed(self, lost_s: float = 0.0) -> float:
        """Starts a wait; its length in seconds. lost_s: for so long the failure has held up everything else."""
        wait_s = self._next_s
        self._due = time.monotonic() + wait_s
        self._next_s = min(2 * wait_s, max(_LONGEST_S, _TIMES_LOST * lost_s))
        return wait_s

    def reset(self) -> None:
        """The next wait is the first again."""
        self._next_s = self._first_s
