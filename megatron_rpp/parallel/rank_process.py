"""Process details of one local rank: how it is spawned, and how it ends when told to. Imports no torch."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_rpp.parallel import stop_request
from megatron_rpp.parallel.die_with_parent import signal_at_parents_death
from megatron_rpp.parallel.stop_request import held_for_child

GRACE_S = 10.0
"""Between SIGTERM and the end of a rank that does not heed it."""


def die_with_parent(parent: int) -> Callable[[], None]:
    """For `preexec_fn`: the child gets SIGTERM when its parent ends, however that ends."""

    def request() -> None:
        signal_at_parents_death(signal.SIGTERM)
        if os.getppid() != parent:  # the parent ended before the request
            os._exit(128 + signal.SIGTERM)

    return request


def spawn_rank(
    argv: Sequence[str], env: Mapping[str, str], log: Path | None, listener: socket.socket | None
) -> subprocess.Popen[bytes]:
    """Start one rank in its own session, so that Ctrl-C reaches it once, from the launcher.

    `log` takes its output; None leaves it the terminal. `listener` is inherited by the rank.
    """
    out = log.open("ab") if log else None
    try:
        with held_for_child():  # until the rank can take the signal
            return subprocess.Popen(
                argv,
                env=dict(env),
                stdout=out,
                stderr=subprocess.STDOUT if out else None,
                pass_fds=(listener.fileno(),) if listener else (),
                start_new_session=True,
                preexec_fn=die_with_parent(os.getpid()),
            )
    finally:
        if out:
            out.close()


@contextmanager
def left_out_of_collections() -> Iterator[None]:
    """No garbage is collected meanwhile, and no collection ever goes through what is made: imports, which last.

    Torch's and Megatron's are so many objects that each collection of all would hold a step up, rank by rank.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def take_signals(launcher: str, env: Mapping[str, str], *, saves: bool) -> None:
    """What a rank does on signals, and when its launcher dies; for its main thread, before anything else.

    launcher: as in JobPlace. saves: it heeds stop_request.
    """
    stop_request.listen(env)
    if not (saves and stop_request.sigterm_asks_to_stop(env)):
        exit_on_sigterm()
    # Our own launcher has asked for it already; a rank that was started by hand may outlive its shell.
    if launcher in ("slurm", "mpi") or "TORCHELASTIC_RUN_ID" in env:
        signal_at_parents_death(signal.SIGKILL)


def exit_on_sigterm(grace_s: float = GRACE_S) -> None:
    """Turn SIGTERM into SystemExit, so that `finally` blocks stop the rollout server.

    Python runs a handler only between byte codes, and a rank may sit in a collective that never ends;
    a thread therefore ends the process `grace_s` after the signal.
    """
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.signal(signal.SIGTERM, _raise_exit)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_end_after_grace, args=(read_fd, grace_s), daemon=True).start()


def _forget() -> None:
    """In a forked worker: its SIGTERM must end it alone, and not wake the thread of the rank."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise_exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _end_after_grace(read_fd: int, grace_s: float) -> None:
    while signal.SIGTERM not in os.read(read_fd, 64):
        pass
    time.sleep(grace_s)
    os._exit(128 + signal.SIGTERM)
