"""Ranks that are forks of one process which has imported everything: they start at once and can be killed singly.

The process must have no threads: it is a script of its own, never pytest.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path

from megatron_rpp.parallel.die_with_parent import signal_at_parents_death


def run_forked(world_size: int, action: Callable[[], None], logs: Path) -> list[int]:
    """Run `action` as every rank of a job; their exit codes, negative for signals.

    As soon as one rank has failed or was killed the others are killed too.
    """
    logs.mkdir(parents=True, exist_ok=True)
    job = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "RPP_LOCAL_JOB": uuid.uuid4().hex}
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        host, port = listener.getsockname()
        job |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
        running = {_fork(rank, job, listener, action, logs): rank for rank in range(world_size)}
    codes = [0] * world_size
    while running:
        pid, status = os.wait()
        codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
    return codes


def _fork(rank: int, job: dict[str, str], listener: socket.socket, action: Callable[[], None], logs: Path) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        signal_at_parents_death(signal.SIGKILL)
        log = os.open(logs / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update({**job, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        if rank == 0:
            os.environ["RPP_MASTER_LISTEN_FD"] = str(listener.detach())
        else:
            listener.close()
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
