"""A verifier that does to its worker what the answer says."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

SCORER = "tests.support.bad_verifiers:obedient"


def obedient() -> Callable[[str, Any], float]:
    """1.0 for an honest answer; the name of a deed is done."""
    return lambda answer, _: DEEDS[answer]() if answer in DEEDS else float(answer == "right")


def _loop() -> float:
    while True:
        pass


def _sleep() -> float:
    time.sleep(1000)
    return 1.0


def _one_c_call() -> float:
    re.match(r"(a+)+$", "a" * 100 + "b")
    return 1.0


def _eat_memory() -> float:
    return float(len([bytearray(1 << 20) for _ in itertools.count()]))


def _segfault() -> float:
    return float(ctypes.string_at(0)[0])


def _exit() -> float:
    sys.exit(0)


def _recurse() -> float:
    sys.setrecursionlimit(1 << 30)

    def deeper() -> float:
        return deeper() + 1.0

    return eval("deeper()")


def _fork_and_answer() -> float:
    """Two processes come back from here."""
    os.fork()
    return 1.0


def _fork_and_hang() -> float:
    os.fork()
    return _loop()


def _kill_the_parent() -> float:
    os.kill(os.getppid(), signal.SIGKILL)
    return _sleep()


def _nap() -> float:
    time.sleep(0.05)
    return 1.0


def _close_everything() -> float:
    os.closerange(0, 256)
    return 1.0


def _channels() -> list[int]:
    found = []
    for fd in range(256):
        try:
            socket.socket(fileno=os.dup(fd)).close()
            found.append(fd)
        except OSError:
            continue
    return found


def _print_garbage() -> float:
    sys.stdout.write("999 1.0\n" * 1000)
    sys.stdout.flush()
    os.write(2, b"garbage")
    return 1.0


def _say(text: bytes) -> Callable[[], float]:
    def deed() -> float:
        for fd in _channels():
            os.write(fd, text)
        return 1.0

    return deed


def _raise() -> float:
    raise KeyboardInterrupt


DEEDS: dict[str, Callable[[], float]] = {
    "loop": _loop,
    "sleep": _sleep,
    "one C call": _one_c_call,
    "eat memory": _eat_memory,
    "segfault": _segfault,
    "exit": _exit,
    "abort": os.abort,
    "recurse": _recurse,
    "fork and hang": _fork_and_hang,
    "kill the parent": _kill_the_parent,
    "close everything": _close_everything,
    "garbage on the channel": _say(b"\xff\x00garbage\n"),
    "a score of another item": _say(b"999 1.0\n"),
    "garbage without end": _say(b"9" * 100_000),
    "not a number": lambda: float("nan"),
    "raise": _raise,
    # A score, if with bad manners:
    "nap and be right": _nap,
    "fork and answer": _fork_and_answer,
    "print garbage": _print_garbage,
    "a score above 1": lambda: 7.0,
}
