"""Runs a command that the kernel kills when its parent dies: die_with_parent.py PARENT_PID COMMAND...

A script of its own, not a preexec_fn: the trainer has threads, and Python code between fork and
exec can then deadlock. Linux only. SGLang's worker processes ask the same of their own parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    parent, command = int(argv[1]), argv[2:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the call above
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv)
