"""Worker processes that score answers with a hard time limit for each."""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rpp.reward.worker import Job

START_LIMIT_S = 120.0  # importing sympy on a busy machine
ITEMS_PER_WORKER = 32  # fewer items do not pay for one more process


class WorkerPool:
    """Scores jobs in up to `max_workers` processes, which start at first use and stay."""

    def __init__(self, max_workers: int = 4) -> None:
        self._workers = [_Worker() for _ in range(max_workers)]

    def score(self, job: Job) -> list[float]:
        """One score from 0 to 1 for each item; 0 for one that took too long or broke its worker.

        Raises:
            RuntimeError: a worker does not start, for want of a package for instance.
        """
        if not job.items:
            return []
        count = min(len(self._workers), -(-len(job.items) // ITEMS_PER_WORKER))
        parts = [replace(job, items=job.items[i::count]) for i in range(count)]
        scores = [0.0] * len(job.items)
        with ThreadPoolExecutor(count) as threads:
            for i, part in enumerate(threads.map(_Worker.score, self._workers[:count], parts)):
                scores[i::count] = part
        return scores

    def close(self) -> None:
        """Ends the processes; a later `score` starts new ones."""
        for worker in self._workers:
            worker.stop()


class _Worker:
    """One process. It is replaced when it dies or is killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""

    def score(self, job: Job) -> list[float]:
        scores: list[float] = []
        while len(scores) < len(job.items):
            self._send(replace(job, items=job.items[len(scores) :]))
            scores += self._receive(len(job.items) - len(scores), job.time_limit_s)
            if len(scores) < len(job.items):  # the next answer hung or broke the process
                self.stop()
                scores.append(0.0)
        return scores

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process, self._pending = None, b""

    def _send(self, job: Job) -> None:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._process = _start()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(pickle.dumps(job))
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_line` below reports the end of the process
        first = self._line(START_LIMIT_S)
        if first != "ready":
            self.stop()
            raise RuntimeError(f"the {job.kind} verifier did not start: {first or 'no answer'}")

    def _receive(self, count: int, time_limit_s: float) -> list[float]:
        """Scores until all are there or one is late."""
        scores: list[float] = []
        while len(scores) < count:
            line = self._line(time_limit_s)
            if line is None:
                break
            scores.append(float(line))
        return scores

    def _line(self, limit_s: float) -> str | None:
        """The next line, or None when none comes within `limit_s` or the process has ended."""
        assert self._process is not None and self._process.stdout is not None
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return None
            chunk = os.read(self._process.stdout.fileno(), 65536)
            if not chunk:
                return None
            self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        return line.decode("ascii", errors="replace")


def _start() -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    # One BLAS thread: each thread reserves address space, which the worker's memory limit counts.
    environment: dict[str, Any] = {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    # SLURM signals every process of a step; SIGUSR1 asks the ranks to save, and would end a worker.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_rpp.reward.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unique(items: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The distinct items, in order of first appearance."""
    return list(dict.fromkeys(items))
