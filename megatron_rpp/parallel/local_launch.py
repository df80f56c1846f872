"""Start every rank of a job on this host, and end them together. Imports no torch.

The launcher opens the rendezvous port and rank 0 inherits the socket (RPP_MASTER_LISTEN_FD), so no
other process can take the port in between.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from megatron_rpp.config.own_environment import inherited
from megatron_rpp.observability.logs import log_path, tail
from megatron_rpp.parallel import failures
from megatron_rpp.parallel.environment import node_name
from megatron_rpp.parallel.exit_codes import ENDED_BY_SIGNAL, ERROR_PREFIX, STOPPED, TAKEN_OVER, USER_ERROR
from megatron_rpp.parallel.failures import LINES_SHOWN, Failure
from megatron_rpp.parallel.rank_process import GRACE_S, spawn_rank

POLL_S = 0.05
SETTLE_S = 1.0
"""Once a rank has failed, another may be about to tell the user why; it has this long."""
TELL_S = 10.0
"""And rank 0 this long where a rank found a user's mistake: mostly all do, and on a busy machine 0 may be late."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def launch_local(argv: Sequence[str], world_size: int, run_dir: str | Path) -> int:
    """Run `argv` once a rank with torchrun's variables, and return the job's exit code.

    Rank 0 has the terminal; the others write to RUN_DIR/logs/rank-N.txt. When a rank fails the others
    are ended; the code is 2 where any rank ended with 2, TAKEN_OVER where any ended with that, else that of the first
    that failed. It is STOPPED where all ended well, having saved at a safe point.
    """
    log_path(run_dir, 0).parent.mkdir(parents=True, exist_ok=True)
    job = _Job(Path(run_dir))
    handlers = {number: signal.signal(number, job.forward) for number in FORWARDED}
    try:
        _start(job, argv, world_size)
        return _wait(job)
    finally:
        _end(job)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@dataclass
class _Job:
    run_dir: Path
    attempt: str = ""
    ranks: list[subprocess.Popen[bytes]] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)  # signals that came while ranks were being started

    def forward(self, number: int, frame: FrameType | None) -> None:
        self.pending.append(number)

    def send(self, number: int) -> None:
        for rank in self.ranks:
            rank.send_signal(number)  # does nothing to a rank that has ended

    def running(self) -> bool:
        return any(rank.poll() is None for rank in self.ranks)

    def failed(self) -> list[int]:
        return [n for n, rank in enumerate(self.ranks) if rank.poll() not in (None, 0, STOPPED)]


def _start(job: _Job, argv: Sequence[str], world_size: int) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=2 * world_size + 8) as listener:
        name = f"local.{time.strftime('%Y%m%d-%H%M%S')}.{os.getpid()}.{listener.getsockname()[1]}"
        base = {**inherited(), "RPP_LOCAL_JOB": name}
        job.attempt = base.get("RPP_ATTEMPT") or name
        for rank in range(world_size):
            env = _rank_env(base, rank, world_size, listener)
            log = log_path(job.run_dir, rank) if rank else None
            job.ranks.append(spawn_rank(argv, env, log, listener if rank == 0 else None))


def _rank_env(base: Mapping[str, str], rank: int, world_size: int, listener: socket.socket) -> dict[str, str]:
    host, port = listener.getsockname()
    env = {"OMP_NUM_THREADS": "1", **base}
    env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    env |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    if rank == 0:
        env["RPP_MASTER_LISTEN_FD"] = str(listener.fileno())
    return env


def _wait(job: _Job) -> int:
    while job.running():
        while job.pending:
            job.send(job.pending.pop(0))
        if job.failed():
            return _fail(job)
        time.sleep(POLL_S)
    if job.failed():
        return _fail(job)
    return STOPPED if any(rank.returncode == STOPPED for rank in job.ranks) else 0


def _fail(job: _Job) -> int:
    """One or more ranks have failed: end the others, show why, and choose the exit code."""
    first = job.failed()[0]
    _wait_until(lambda: not job.running(), SETTLE_S)
    if _code(job.ranks[first]) == USER_ERROR:
        _wait_until(lambda: job.ranks[0].poll() is not None, TELL_S)
    told = [n for n in job.failed() if _code(job.ranks[n]) == USER_ERROR]
    _report_killed(job)
    _end(job)
    if told:
        if 0 not in told:
            _show([_told_line(job, told[0])])
        return USER_ERROR
    _show_failure(job, first)
    codes = [_code(job.ranks[n]) for n in job.failed()]
    return TAKEN_OVER if TAKEN_OVER in codes else _code(job.ranks[first])


def _told_line(job: _Job, rank: int) -> str:
    """The one line that a rank above 0 wrote for the user."""
    lines = [line for line in _log(job, rank) if line.startswith(ERROR_PREFIX)]
    return lines[-1] if lines else f"{ERROR_PREFIX}rank {rank} refused; see {log_path(job.run_dir, rank)}"


def _report_killed(job: _Job) -> None:
    """Ranks that were ended by a signal, not by this launcher, had no time to report it themselves."""
    host = node_name()
    for n in job.failed():
        code = job.ranks[n].returncode
        if code < 0 and _code(job.ranks[n]) not in ENDED_BY_SIGNAL:
            failure = Failure(n, host, "lost", f"was ended by {signal.Signals(-code).name}", (), time.time())
            failures.report(job.run_dir, job.attempt, failure, rank=n, host=host)


def _show_failure(job: _Job, rank: int) -> None:
    """The first cause that the ranks have reported; else how `rank`, the first that was seen to fail, has ended."""
    code = job.ranks[rank].returncode
    found = failures.causes(job.run_dir, job.attempt)
    if found and (found[0].kind == "error" or code > 0) and found[0].kind != "signal":
        lines = failures.lines(job.run_dir, found[0])
        _show(lines if found[0].rank else lines[:1])  # rank 0 has the terminal
        return
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    _show([f"rpp: rank {rank} {how}"])
    if rank and _code(job.ranks[rank]) not in ENDED_BY_SIGNAL:
        _show([f"rpp: the end of {log_path(job.run_dir, rank)}:", *_log(job, rank)])


def _end(job: _Job) -> None:
    """SIGTERM to the ranks that still run, and SIGKILL to those that run on."""
    job.send(signal.SIGTERM)
    _wait_until(lambda: not job.running(), GRACE_S)
    job.send(signal.SIGKILL)
    for rank in job.ranks:
        rank.wait()


def _wait_until(done: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not done() and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _code(rank: subprocess.Popen[bytes]) -> int:
    """The exit code as a shell reports it: 128 + N for a rank ended by signal N."""
    return 128 - rank.returncode if rank.returncode < 0 else rank.returncode


def _log(job: _Job, rank: int) -> list[str]:
    return tail(log_path(job.run_dir, rank), LINES_SHOWN)


def _show(lines: Sequence[str]) -> None:
    sys.stderr.write("".join(f"{line}\n" for line in lines))
