"""One worker process, seen from the trainer: asked for one score at a time, and not trusted in what it says."""

from __future__ import annotations

import contextlib
import enum
import pickle
import re
import signal
import time
from typing import Any

from megatron_rpp.reward.workers.fork_server import ForkedProcess, ForkServer

MAX_ANSWERS = 500  # then a fresh one takes over: sympy's caches grow with every answer
CLOCK_FACTOR = 4.0
"""Limits are of processor time, so that verdicts do not change on a busy machine; by the clock they are that longer."""
_REPLY = re.compile(rb"(\d{1,9}) (memory|-?\d{1,20}(?:\.\d{1,20})?(?:e[-+]\d{1,3})?)\n")


class Failure(enum.Enum):
    """Why a worker gave no score: its time was over; or it ended, ran out of memory or said what it must not."""

    TIME = "time"
    BROKEN = "broken"


class ScoringWorker:
    """Scores one item at a time. Whoever gets a Failure from it kills it."""

    def __init__(self, process: ForkedProcess) -> None:
        self.process = process
        self.number = -1  # of the item it was last asked for
        self.deadline = 0.0  # monotonic, of that item
        self.is_first_try = True
        self._answers = 0
        self._pending = b""

    @property
    def is_worn(self) -> bool:
        """Whether it has scored so many items that a fresh worker should go on."""
        return self._answers >= MAX_ANSWERS

    def ask(self, number: int, item: tuple[str, Any], limit_s: float) -> bool:
        """Sends an item, which may take `limit_s` of processor time; False where the worker does not take it."""
        self.number, self.deadline = number, time.monotonic() + CLOCK_FACTOR * limit_s
        self.process.channel.settimeout(CLOCK_FACTOR * limit_s)
        try:
            self.process.channel.sendall(pickle.dumps((number, *item, limit_s)))
        except OSError:
            return False
        return True

    def read(self) -> float | Failure | None:
        """The score, now that there is something to read; None where the line is not complete yet.

        BROKEN where it has ended, too, whether or not the kernel did that because its time was over.
        """
        try:
            received = self.process.channel.recv(4096)
        except OSError:
            return Failure.BROKEN
        self._pending += received
        if received and b"\n" not in self._pending and len(self._pending) < 64:
            return None
        match = _REPLY.fullmatch(self._pending)
        self._pending = b""
        if match is None or int(match[1]) != self.number or match[2] == b"memory":
            return Failure.BROKEN
        self._answers += 1
        return float(match[2])


def ask_in_words(server: ForkServer, data: Any, limit_s: float, memory_bytes: int) -> str | Failure:
    """The line that the scorer returns to ("", data), in a worker of its own and within `limit_s` by the clock."""
    process, said = server.fork(memory_bytes), b""
    deadline, failure = time.monotonic() + limit_s, Failure.BROKEN
    try:
        process.channel.settimeout(limit_s)
        process.channel.sendall(pickle.dumps((0, "", data, limit_s)))
        while not said.endswith(b"\n"):
            process.channel.settimeout(max(deadline - time.monotonic(), 1e-3))
            received = process.channel.recv(1 << 16)
            if not received:
                break
            said += received
    except TimeoutError:
        failure = Failure.TIME
    except OSError:  # it ended
        said = b""
    finally:
        ended_by = server.kill(process)
    if not said.startswith(b"0 ") or not said.endswith(b"\n") or said == b"0 memory\n":
        return Failure.TIME if ended_by == signal.SIGPROF else failure
    with contextlib.suppress(UnicodeDecodeError):
        return said[2:-1].decode()
    return Failure.BROKEN
