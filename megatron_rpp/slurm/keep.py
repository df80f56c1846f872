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

    def end(number: int, frame: FrameType | None) -> None:
        if child is not None:
            child.terminate()
            child.wait()
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    while True:
        child = subprocess.Popen(command, preexec_fn=lambda: signal_at_parents_death(signal.SIGTERM))
        code = child.wait()
        if code == USER_ERROR:
            return code
        sys.stderr.write(f"rpp: {' '.join(command[:5])} ... ended with {code}; starting it again in {_PAUSE_S:g} s\n")
        time.sleep(_PAUSE_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
