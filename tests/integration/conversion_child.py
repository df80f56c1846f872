"""A conversion that kills itself with SIGKILL at a chosen operation, in a process forked after the imports."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_rpp.conversion import progress, to_hf, to_megatron

FILE_BYTES = 20_000  # several files for a tiny model
_AUDITED = ("open", "os.rename", "os.remove", "os.mkdir", "shutil.copyfile", "shutil.rmtree")


def convert(direction: str, source: Path, out: Path) -> None:
    """In files small enough that there are several."""
    if direction == "to_megatron":
        asked = to_megatron.ToMegatron(str(source), str(out), tensor=2, file_bytes=FILE_BYTES)
        to_megatron.convert_to_megatron(asked)
    else:
        to_hf.convert_to_hf(to_hf.ToHF(str(source), str(out), file_bytes=FILE_BYTES))


def child(direction: str, source: Path, out: Path, kill_at: int, report: Path | None) -> None:
    """Convert, and die before operation number `kill_at` on OUT's folder; count all of them into `report`.

    Operations: opening, making, removing, renaming and syncing files, and each tensor that is written.
    """
    done = [0]

    def operation(*unused: Any) -> None:
        done[0] += 1
        if done[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _AUDITED and str(out) in str(arguments):
            operation()

    sync = os.fsync
    os.fsync = lambda descriptor: (operation(), sync(descriptor))[1]  # type: ignore[assignment]
    tell = progress.Progress.__call__
    progress.Progress.__call__ = lambda self, n: (operation(), tell(self, n))[1]  # type: ignore[method-assign]
    sys.addaudithook(audit)
    convert(direction, source, out)
    if report is not None:
        report.write_text(str(done[0]))
