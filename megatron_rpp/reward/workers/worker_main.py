"""The processes that run verifiers on text that nobody has checked: a parent that forks workers.

An answer can keep the interpreter inside one C call, where neither a thread nor a signal handler stops it
(9^9^9^9), eat memory or crash it. So each worker may be killed at any time, and another one is a fork away:
the parent has imported the verifier, and never looks at an answer.

    trainer  --spawns-->  parent  --forks-->  workers
    trainer -> parent, on stdin: one pickled (path of the maker of the scorer, its arguments), then commands
               "fork MEMORY_BYTES" and "kill PID". On the control socket: "ready" or "error ...", then the answer
               to each command: the PID with the worker's socket attached, or the signal that has ended the worker,
               0 where it was none.
    trainer -> worker: pickled (number of the item, answer, its data, seconds of processor time it may take). Back:
               one line "NUMBER SCORE", "NUMBER memory", or "NUMBER" and what the scorer says in words; never pickle,
               as what runs there is not trusted.

All of it ends when the trainer does: the parent's stdin closes, and workers do not outlive the parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import math
import os
import pickle
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Scorer = Callable[[str, Any], float | str]
PR_SET_PDEATHSIG = 1


def main(control_fd: int) -> None:
    """Forks and kills workers on command, until stdin closes; what verifiers print goes nowhere."""
    control = socket.socket(fileno=control_fd)
    sink = os.open(os.devnull, os.O_RDWR)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    workers: set[int] = set()
    try:
        scorer = _load(*pickle.load(sys.stdin.buffer))
    except Exception as error:  # whatever it is, the trainer is to say it
        control.send(f"error {type(error).__name__}: {error}".encode()[:4000])
        return
    gc.freeze()  # workers share these pages until they are written to
    control.send(b"ready")
    try:
        for line in sys.stdin.buffer:
            command, value = line.split()
            if command == b"fork":
                workers.add(_fork(control, scorer, int(value)))
            else:
                control.send(str(_kill(int(value), workers)).encode())
    finally:
        for pid in [*workers]:
            _kill(pid, workers)


def _load(path: str, arguments: dict[str, Any]) -> Scorer:
    module, _, name = path.partition(":")
    made: Scorer = getattr(importlib.import_module(module), name)(**arguments)
    return made


def _fork(control: socket.socket, scorer: Scorer, memory_bytes: int) -> int:
    ours, theirs = socket.socketpair()
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        try:
            ours.close()
            control.close()
            _confine(memory_bytes, parent)
            _serve(theirs, scorer)
        finally:
            os._exit(1)
    theirs.close()
    socket.send_fds(control, [str(pid).encode()], [ours.fileno()])
    ours.close()
    return pid


def _confine(memory_bytes: int, parent: int) -> None:
    _end_with_parent()
    os.register_at_fork(after_in_child=_end_with_parent)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)
    os.setsid()  # what it forks in turn is killed with it
    os.dup2(1, 0)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, from within a C call too
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + memory_bytes, used_bytes + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill(pid: int, workers: set[int]) -> int:
    """Ends a worker and what it has forked; the signal that has ended it, which may have been an earlier one."""
    if pid not in workers:  # the number of a stranger's process; a worker keeps its own until it is waited for
        return 0
    workers.remove(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _serve(channel: socket.socket, scorer: Scorer) -> None:
    own_pid = os.getpid()
    requests = channel.makefile("rb")
    while True:
        try:
            number, answer, data, limit_s = pickle.load(requests)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        reply = _score(scorer, answer, data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if os.getpid() != own_pid:
            return  # the verifier forked, and this is the copy
        channel.sendall(f"{number} {reply}\n".encode())
        if reply == "memory":
            return


def _score(scorer: Scorer, answer: str, data: Any) -> str:
    try:
        value = scorer(answer, data)
        score = 0.0 if isinstance(value, str) else float(value)
    except MemoryError:
        return "memory"
    except Exception:  # any failure on untrusted text means: not a right answer
        return "0.0"
    if isinstance(value, str):
        return value
    return repr(score) if math.isfinite(score) else "0.0"


if __name__ == "__main__":
    main(int(sys.argv[1]))
