"""A guard on every node: the supervisor sees at once which node is gone, and the nodes see if the supervisor's is.

SLURM itself notices a dead node only after SlurmdTimeout, five minutes on many sites. Guards and supervisor
exchange a byte now and then over TCP. Where the batch host dies, the supervisor dies with it: then the first guard
left submits the replacement.

    python -m megatron_rpp.slurm.guard SUPERVISOR_HOST PORT DEADLINE_S RUN_DIR ATTEMPT
"""

from __future__ import annotations

import enum
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_rpp.slurm import client
from megatron_rpp.slurm.history import Try, steps_done
from megatron_rpp.slurm.node_watch import BEAT, FAREWELL, beat_s
from megatron_rpp.slurm.replacement import Replacement

logger = logging.getLogger("megatron_rpp.slurm")

_IGNORED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
_RESCUE_S = 600.0  # a controller may be away for a while
_PAUSE_S = 10.0


class End(enum.Enum):
    """How the exchange of beats ended."""

    FAREWELL = "the job ends"
    SILENT = "the supervisor's host is silent"
    CLOSED = "the supervisor has ended without a farewell; its host lives"
    NEVER = "the supervisor was never reached"


def stand_guard(host: str, port: int, deadline_s: float, node: str) -> End:
    """Exchange beats until that is over; a broken connection is made anew once."""
    end = _exchange(host, port, deadline_s, node)
    if end in (End.SILENT, End.CLOSED):
        again = _exchange(host, port, deadline_s, node)
        end = again if again != End.NEVER else end
    return end


def _exchange(host: str, port: int, deadline_s: float, node: str) -> End:
    has_beaten = False
    try:
        with socket.create_connection((host, port), timeout=deadline_s) as connection:
            connection.settimeout(deadline_s)
            connection.sendall(f"{node}\n".encode())
            while True:
                got = connection.recv(1)
                if got != BEAT:
                    return End.FAREWELL if got == FAREWELL else End.CLOSED if has_beaten else End.NEVER
                has_beaten = True
                time.sleep(beat_s(deadline_s))
                connection.sendall(BEAT)
    except TimeoutError:
        return End.SILENT if has_beaten else End.NEVER
    except OSError:
        return End.CLOSED if has_beaten else End.NEVER


def rescue(replacement: Replacement, run_dir: Path, attempt: str, turn: int, deadline_s: float, end: End) -> None:
    """Submit the job anew, unless the supervisor lives, someone else has done it, or the job was meant to end.

    turn: guards act one after the other, so that the next one sees what the first has done.
    """
    if _moves(replacement.is_alive_file, (turn + 1) * deadline_s):
        logger.warning("the supervisor lives, and only this node cannot reach it")
        return
    submission = replacement.load()
    if not _was_not_ended(submission.job, {"RUNNING"} if end == End.SILENT else {"RUNNING", "FAILED", "OUT_OF_MEMORY"}):
        return
    lost = [submission.nodes[0]] if end == End.SILENT else []
    cause = f"node {submission.nodes[0]}, which ran the batch script, is lost" if lost else end.value
    replacement.history.end(attempt, Try.LOST_NODES if lost else Try.FAILED, cause, steps_done(run_dir), lost)
    if replacement.history.in_vain() >= submission.max_tries:
        sys.stderr.write(f"rpp: {cause}; given up after {submission.max_tries} tries in vain\n")
        return
    if new := retried(replacement.submit_once):
        sys.stderr.write(f"rpp: {cause}; job {new} replaces job {submission.job}\n")
    if lost:
        client.cancel(submission.job)


def retried(act: Callable[[], str | None]) -> str | None:
    """`act`, again and again while SLURM fails, for ten minutes. Raises the last SlurmError."""
    end = time.monotonic() + _RESCUE_S
    while True:
        try:
            return act()
        except client.SlurmError as error:
            if time.monotonic() > end:
                raise
            logger.warning("%s; trying again", error)
            time.sleep(_PAUSE_S)


def _moves(path: Path, duration_s: float) -> bool:
    """Whether the file is touched within that time."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    end = time.monotonic() + duration_s
    while time.monotonic() < end:
        time.sleep(min(1.0, duration_s / 5))
        if path.exists() and path.stat().st_mtime_ns != before:
            return True
    return False


def _was_not_ended(job: str, states: set[str]) -> bool:
    """Whether the job is in one of `states`, once it is no longer COMPLETING, which hides them."""
    for _ in range(20):
        state = client.job_state(job)
        if state != "COMPLETING":
            return state in states
        time.sleep(1.0)
    return False


def main(words: Sequence[str]) -> int:
    host, port, deadline_s, run_dir, attempt = words
    for number in _IGNORED:  # sent to all steps before a time limit or a preemption; the supervisor ends guards
        signal.signal(number, signal.SIG_IGN)
    node = os.environ["SLURMD_NODENAME"]
    end = stand_guard(host, int(port), float(deadline_s), node)
    if end in (End.SILENT, End.CLOSED):
        replacement = Replacement(Path(run_dir), attempt)
        nodes = replacement.load().nodes
        if node != nodes[0]:
            rescue(replacement, Path(run_dir), attempt, nodes.index(node) - 1, float(deadline_s), end)
    elif end == End.NEVER:
        sys.stderr.write(f"rpp: {node} cannot reach the supervisor on {host}:{port}; SLURM alone watches over it\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
