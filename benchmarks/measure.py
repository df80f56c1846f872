"""Time and peak memory of one function, in a process of its own."""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

import psutil

Inputs = TypeVar("Inputs")


def measure(
    run: Callable[[Inputs], object], inputs: Callable[[], Inputs], small: Callable[[], Inputs], repeats: int = 1
) -> dict[str, float]:
    """`seconds`, `cpu_seconds` (medians) and `peak_bytes` of run(inputs()), all three module-level or partials.

    A first run on `small()` loads what is loaded once. Memory is the peak of the resident set (VmHWM) over all
    repeats less the resident set just before, with the inputs in place.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_in_process, args=(theirs, run, inputs, small, repeats))
    process.start()
    theirs.close()  # or `recv` would wait forever for a process that was killed for its memory
    try:
        found: dict[str, float] = ours.recv()
    except EOFError:
        sys.exit(f"the process that measures {run} ended without a result; try a smaller size")
    finally:
        process.join()
    return found


def _in_process(
    pipe: Connection,
    run: Callable[[Inputs], object],
    inputs: Callable[[], Inputs],
    small: Callable[[], Inputs],
    repeats: int,
) -> None:
    run(small())
    given = inputs()
    before = psutil.Process().memory_info().rss
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        started, cpu_started = time.perf_counter(), time.process_time()
        run(given)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    pipe.send(
        {
            "seconds": statistics.median(seconds),
            "cpu_seconds": statistics.median(cpu_seconds),
            "peak_bytes": float(_peak_rss() - before),
        }
    )


def _peak_rss() -> int:
    """Bytes. Not ru_maxrss: through fork and exec that would start from the size of the parent."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
