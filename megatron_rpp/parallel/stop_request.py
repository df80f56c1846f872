"""Signals that ask a rank to save at the next safe point and to end with STOPPED. Imports no torch.

SIGUSR1 does everywhere; SIGTERM does under SLURM, which sends it before the time limit's SIGKILL.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

_requested = False


def listen(env: Mapping[str, str] = os.environ) -> None:
    """Take the signals from here on; for the main thread."""
    numbers = [signal.SIGUSR1]
    if sigterm_asks_to_stop(env):
        numbers.append(signal.SIGTERM)
    for number in numbers:
        signal.signal(number, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # the launcher started this process with SIGUSR1 held back
    os.register_at_fork(after_in_child=lambda: _forget(numbers))


def is_requested() -> bool:
    """Whether this rank has been asked. Others may not have been, or not yet."""
    return _requested


def sigterm_asks_to_stop(env: Mapping[str, str]) -> bool:
    """Whether SIGTERM leaves time to save: it is SLURM's, and not that of the local launcher inside a job."""
    return "SLURM_JOB_ID" in env and "RPP_LOCAL_JOB" not in env


@contextmanager
def held_for_child() -> Iterator[None]:
    """A process started inside does not get SIGUSR1, or not before it calls `listen`.

    SLURM signals all processes of a step, and the signal would end a server or a verifier. Safe in any thread.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _note(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True


def _forget(numbers: list[signal.Signals]) -> None:
    """In a forked worker: a request is not its business, and SIGTERM must end it."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN if number == signal.SIGUSR1 else signal.SIG_DFL)
