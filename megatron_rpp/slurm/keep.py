"""Runs a command for as long as a step lives, and again whenever it ends.

    python -m megatron_rpp.slurm.keep COMMAND ...

Ends at SIGTERM, which it passes on, or where the command says that its user must change something.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from megatron_rpp.parallel.die_with_parent import signal_at_parents_death
from megatron_rpp.parallel.exit_codes import USER_ERROR

_PAUSE_S = 5.0


def main(command: Sequence[str]) -> int:
    child: subprocess.Popen[bytes] | None = None
    is_over = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal is_over
        is_over = True
        if child is not None:
            child.send_signal(signal.SIGTERM)  # and no more: the line that waits for it would wait for this handler

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    while not is_over:
        child = subprocess.Popen(command, preexec_fn=lambda: signal_at_parents_death(signal.SIGTERM))
        if is_over:  # told while it was being started
            child.terminate()
        code = child.wait()
        if code == USER_ERROR:
            return code
        if not is_over:
            sys.stderr.write(f"rpp: {' '.join(command[:5])} ... ended with {code}; again in {_PAUSE_S:g} s\n")
            time.sleep(_PAUSE_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
