"""What a process of a job that cannot go on leaves behind: stacks in its log, a report, a line for the user."""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_rpp.observability.logs import log_path
from megatron_rpp.parallel.exit_codes import ERROR_PREFIX, USER_ERROR
from megatron_rpp.parallel.failures import Failure, report
from megatron_rpp.parallel.heartbeats import SEEN, Board

if TYPE_CHECKING:
    from megatron_rpp.parallel.environment import JobPlace

LINGER_S = 2.0
"""Rank 0, whose end ends the store, waits so long for the others to read the verdict."""
_POLL_S = 0.02


class LastWords:
    """Of one rank. Its methods may be called by any thread."""

    def __init__(self, place: JobPlace, run_dir: str | Path) -> None:
        """The folder of the ranks' logs is made."""
        self._place, self._run_dir = place, run_dir
        log = log_path(run_dir, place.rank)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("ab", buffering=0)
        self.traceback = ""
        """Of this rank's own error, until that has been logged by who caught it."""

    def arm(self, deadline_s: float) -> None:
        """Unless this is called again, show in the log where this rank is.

        That needs no GIL, which the rank may hold for good.
        """
        faulthandler.dump_traceback_later(deadline_s, file=self._log)

    def report(self, failure: Failure) -> None:
        """Note it in the run directory, unless this rank has noted one before."""
        report(self._run_dir, self._place.attempt, failure, rank=self._place.rank, host=self._place.host)

    def acknowledge(self, board: Board, verdict: Failure) -> None:
        """Say that it is known; on rank 0, whose end ends the store, wait for all to say so."""
        has_time = verdict.kind != "signal"  # who was told to end is soon killed, and so were the others told
        deadline = time.monotonic() + (LINGER_S if has_time else 0.0)
        with suppress(dist.DistError):  # the store has ended before this rank
            board.beat(SEEN)
            while self._place.rank == 0 and time.monotonic() < deadline:
                beats = board.beats(range(self._place.world_size)).values()
                if all(beat.state == SEEN or beat.host in verdict.lost_hosts for beat in beats):
                    return
                time.sleep(_POLL_S)

    def end(self, verdict: Failure) -> None:
        """Dump what every thread is at, and end the process."""
        line = f"{ERROR_PREFIX}{verdict.message}\n" if verdict.exit_code == USER_ERROR else f"rpp: {verdict}\n"
        faulthandler.cancel_dump_traceback_later()
        try:
            self._log.write(f"{self.traceback}{line}rpp: the stacks of this rank, {self._place.rank}:\n".encode())
            faulthandler.dump_traceback(file=self._log, all_threads=True)
            if self._speaks(verdict):
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())
        finally:
            os._exit(verdict.exit_code)

    def close(self) -> None:
        """This process goes on without a watchdog."""
        faulthandler.cancel_dump_traceback_later()
        self._log.close()

    def _speaks(self, verdict: Failure) -> bool:
        """Whether this rank tells the user: one does, as far as that can be known without rank 0."""
        if self._place.launcher == "rpp" and verdict.exit_code != USER_ERROR:
            return False  # the launcher does
        return self._place.rank == 0 or (verdict.rank == 0 and self._place.rank == 1)
