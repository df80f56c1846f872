"""Processes that do not outlive their parent (Linux). As a program, runs a command, and its whole process group too.

    python die_with_parent.py PARENT_PID COMMAND...      (as the leader of a new process group)

A process in between is needed: SGLang's workers ask the kernel to kill them with their own parent, but
only once they have imported everything; a trainer that dies in those seconds would leave them running.
It imports the standard library only, so it costs 20 ms and 10 MB.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """Exits as the command does, by the same status or signal."""
    parent, command = int(argv[1]), argv[2:]
    signal.signal(signal.SIGTERM, _kill_group)
    signal_at_parents_death(signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above
        _kill_group()
    # preexec_fn is safe here, where there are no threads. It covers a SIGKILL of this process.
    child = subprocess.Popen(command, preexec_fn=lambda: signal_at_parents_death(signal.SIGKILL))
    status = child.wait()
    if status < 0:
        if -status == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def signal_at_parents_death(signum: int) -> None:
    """The kernel sends `signum` to this process when its parent ends, more exactly the thread that started it."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signum) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def _kill_group(signum: int = 0, frame: FrameType | None = None) -> None:
    os.killpg(0, signal.SIGKILL)  # this process too


if __name__ == "__main__":
    main(sys.argv)
