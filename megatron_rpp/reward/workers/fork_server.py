"""The trainer's end of `worker_main.py`: starts the parent process, has it fork workers, and has them killed."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rpp.config.reward import START_LIMIT_S

MAX_STARTS = 3  # of the parent, for one worker


@dataclass
class ForkedProcess:
    """A worker, and the socket to it."""

    pid: int
    channel: socket.socket
    parent: subprocess.Popen[bytes]


class ForkServer:
    """The parent of the workers of one scorer. It starts at the first fork, and again if it was killed.

    It answers one command at a time: `lock` is of whoever has a worker or asks for one.
    """

    def __init__(self, scorer: str, arguments: dict[str, Any]) -> None:
        self.lock = threading.Lock()
        self._scorer, self._arguments = scorer, arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    @property
    def is_running(self) -> bool:
        """Whether the parent was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the parent, unless it runs. Raises RuntimeError as `fork`."""
        for _ in range(MAX_STARTS):
            if self.is_running or self._start():
                return
        raise RuntimeError(f"the parent of {self._scorer} workers ended {MAX_STARTS} times: something kills it")

    def fork(self, memory_bytes: int) -> ForkedProcess:
        """A new worker, which may take `memory_bytes` beyond what the parent has.

        Raises:
            RuntimeError: the parent does not start, for want of a package for instance, or not in time, or ends again
                and again.
        """
        for _ in range(MAX_STARTS):
            if not self.is_running and not self._start():
                continue
            reply, fds = self._ask(f"fork {memory_bytes}")
            if fds and self._process is not None:
                return ForkedProcess(int(reply), socket.socket(fileno=fds[0]), self._process)
        raise RuntimeError(f"the parent of {self._scorer} workers ended {MAX_STARTS} times: something kills it")

    def kill(self, worker: ForkedProcess) -> int | None:
        """Ends a worker, and what it has forked, at once.

        Returns:
            The signal that has ended it, SIGKILL where none did before; 0 where it ended by itself; None where its
            parent has died, and the worker with it.
        """
        with worker.channel:  # open until then: at its end the worker would exit
            if worker.parent is not self._process:
                return None  # a later parent may have a worker of this number
            reply, _ = self._ask(f"kill {worker.pid}")
        return int(reply) if reply else None

    def close(self) -> None:
        """Ends all of it; a later `fork` starts anew."""
        if self._process is not None:
            self._process.kill()  # workers do not outlive it
            self._process.communicate()
        if self._control is not None:
            self._control.close()
        self._process = self._control = None

    def _ask(self, command: str) -> tuple[bytes, list[int]]:
        """The parent's answer; empty where it has died: something killed it, as it never looks at an answer."""
        assert self._process is not None and self._process.stdin is not None and self._control is not None
        reply, fds = b"", list[int]()
        try:
            with contextlib.suppress(OSError):
                self._process.stdin.write(f"{command}\n".encode())
                self._process.stdin.flush()
                reply, fds, _, _ = socket.recv_fds(self._control, 64, 1)
        finally:
            if not reply:  # or the wait was interrupted, and the next one would be given this command's answer
                self.close()
        return reply, fds

    def _start(self) -> bool:
        """Whether it is ready; False where it has died, too. Raises RuntimeError for what keeps it from starting."""
        self.close()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(START_LIMIT_S)
        with theirs:
            self._process = _spawn(theirs.fileno())
        assert self._process.stdin is not None
        first = b""
        try:
            self._process.stdin.write(pickle.dumps((self._scorer, self._arguments)))
            self._process.stdin.flush()
            first = self._control.recv(8192)
        except TimeoutError:
            self.close()
            raise RuntimeError(f"importing took over {START_LIMIT_S:g} s; load less at import") from None
        except OSError:  # it has ended
            pass
        if first == b"ready":
            return True
        self.close()
        if first:
            raise RuntimeError(f"the verifier {self._scorer} did not start: {first.decode()}")
        return False


def _spawn(control_fd: int) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    # One BLAS thread: each thread reserves address space, and a fork has only the thread that made it.
    environment: dict[str, Any] = {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    # SLURM signals every process of a step; SIGUSR1 asks the ranks to save, and would end a worker.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_rpp.reward.workers.worker_main", str(control_fd)],
            stdin=subprocess.PIPE,
            pass_fds=(control_fd,),
            env={**os.environ, **environment},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
