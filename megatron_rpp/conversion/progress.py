"""One line on stderr: GB done and to do, GB/s, and the time that is left."""

from __future__ import annotations

import sys
import time

_EVERY_S = {True: 0.2, False: 5.0}  # on a terminal, and in a log


class Progress:
    """Call it with the bytes of each tensor once written."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        """total: bytes to write; done: those that an earlier start has written."""
        self._label, self._total, self._done, self._first = label, max(total, 1), done, done
        self._terminal = sys.stderr.isatty()
        self._started = self._shown = time.monotonic()

    def __call__(self, written: int) -> None:
        self._done += written
        if time.monotonic() - self._shown >= _EVERY_S[self._terminal]:
            self._show(end="" if self._terminal else "\n")

    def finish(self) -> None:
        """The last line."""
        self._done = self._total
        self._show(end="\n", finished=True)

    def _show(self, end: str, finished: bool = False) -> None:
        self._shown = time.monotonic()
        seconds = max(self._shown - self._started, 1e-9)
        rate = (self._done - self._first) / seconds
        left = max(self._total - self._done, 0) / rate if rate else 0.0
        time_text = f"{seconds:.2f} s in all" if finished else f"{left:.0f} s left"
        line = (
            f"{self._label}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s, {time_text}"
        )
        sys.stderr.write(("\r" if self._terminal else "") + line + end)
        sys.stderr.flush()
