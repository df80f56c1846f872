"""Ends every rank of a job within seconds, and says why, when one of them dies or hangs.

Two daemon threads in each rank. One talks to the others through the job's store: it writes a heartbeat, looks
for the verdict, which is the first failure that anyone declared, and acts on it; rank 0's also declares those
lost whose heartbeats have stopped. The other thread only measures time: it cannot be blocked by a store whose
host is gone.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_rpp.config.job import WatchdogConfig
from megatron_rpp.parallel import heartbeats
from megatron_rpp.parallel.failures import Failure
from megatron_rpp.parallel.heartbeats import Beat, Board, Judge
from megatron_rpp.parallel.last_words import LINGER_S, LastWords
from megatron_rpp.parallel.own_failure import failure_of
from megatron_rpp.parallel.peer_errors import is_echo

if TYPE_CHECKING:
    from megatron_rpp.parallel.environment import JobPlace

RANKS_PER_POLL = 256
"""More ranks look for the verdict less often than every POLL_S, to spare rank 0."""
POLL_S = 0.2
CLOSING_POLL_S = 0.02
SAME_ERROR_S = 2.0
"""After a failure of another rank, this one may be about to raise the same, and to tell the user better."""
TEARDOWN_S = 10.0
"""A rank that ends by its own error has so long to stop what it started."""


@dataclass(frozen=True)
class _Phase:
    name: str
    started: float  # monotonic seconds
    limit_s: float


class Watchdog:
    """`with Watchdog(...) as dog, ..., dog.telling():` around a rank's work; a collective over the whole job.

    On the way out it waits until every rank is there. A process whose job cannot go on ends in os._exit.
    """

    def __init__(
        self,
        store: dist.Store,
        place: JobPlace,
        run_dir: str | Path,
        config: WatchdogConfig,
        start_deadline_s: float = 0.0,
    ) -> None:
        """store: kept, since on rank 0 it may be the server. start_deadline_s: as in `phase`, of what is in none.

        The folder of the ranks' logs is made.
        """
        self._original_store, self._place, self._config = store, place, config
        self._words = LastWords(place, run_dir)
        self._interval_s = min(max(config.heartbeat_deadline_s / 10, 0.2), 3.0)
        self._poll_s = min(POLL_S * max(1.0, place.world_size / RANKS_PER_POLL), self._interval_s)
        self._board = Board(store, place.rank, place.host)
        self._judge = Judge(config.heartbeat_deadline_s, self._interval_s)
        self._beats: dict[int, Beat] = {}
        self._state = heartbeats.RUNS
        self._written_state = ""
        self._is_broken = self._is_alarmed = False  # a collective of this rank, or of some rank
        self._last_beat = self._last_look = self._last_talk = time.monotonic()
        self._phase = _Phase("start", time.monotonic(), config.stall_deadline_s + start_deadline_s)
        self._claim: Failure | None = None  # to be declared
        self._verdict: Failure | None = None
        self._wake, self._known = threading.Event(), threading.Event()  # there is something to tell; the verdict came
        self._tears_down, self._told, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._talk, self._guard)]

    def __enter__(self) -> Watchdog:
        self._board.join(self._place.world_size)
        self._look(0.0)
        self._words.arm(self._config.heartbeat_deadline_s)
        self._last_look = self._last_talk = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._begin("exit", math.inf)  # who is late has its own limit
            self._change(heartbeats.DONE)
            self._threads[0].join()
        else:
            self._fail(error)  # of the teardown; nothing where it has been told
            self._told.wait(LINGER_S + 1)
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=LINGER_S)
        self._words.close()

    @contextmanager
    def phase(self, name: str, deadline_s: float = 0.0) -> Iterator[None]:
        """A part of the work: longer than watchdog.stall_deadline_s and its own deadlines together is a stall."""
        outer = self._phase
        self._begin(name, self._config.stall_deadline_s + deadline_s)
        try:
            yield
        finally:
            self._begin(f"after {name}", outer.limit_s)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tells the other ranks of an exception before anything is torn down, and leaves it as it is.

        Where it only says that another rank is gone, waits for the verdict on who, with which the process ends.
        """
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        """This rank ends by `error`."""
        if self._tears_down.is_set():
            return
        self._words.traceback = "".join(traceback.format_exception(error))
        if is_echo(error) and self._place.world_size > 1:
            self._is_broken = True
            self._wake.set()
            if self._known.wait(2 * (self._interval_s + heartbeats.ANSWER_S)):
                self._closed.wait()  # the other thread ends the process
        self._tears_down.set()
        failure = failure_of(error, self._place.rank, self._place.host)
        self._words.report(failure)
        self._tell(failure)
        self._known.wait(LINGER_S)

    def _begin(self, name: str, limit_s: float) -> None:
        self._phase = _Phase(name, time.monotonic(), limit_s)

    def _change(self, state: str) -> None:
        self._state = state
        self._wake.set()

    def _tell(self, failure: Failure) -> None:
        self._claim = self._claim or failure
        self._wake.set()

    # The thread that talks to the others

    def _talk(self) -> None:
        try:
            while self._verdict is None and not self._closed.is_set():
                self._turn()
                self._wake.wait(CLOSING_POLL_S if self._state == heartbeats.DONE else self._poll_s)
                self._wake.clear()
            if self._verdict is not None:
                self._act(self._verdict)
        except dist.DistError:
            self._store_is_gone()
        finally:
            self._told.set()

    def _turn(self) -> None:
        claim = self._claim
        self._verdict = self._board.verdict() or (self._board.declare(claim) if claim else None)
        if self._verdict is not None:
            self._known.set()
            return
        self._is_alarmed = self._board.is_alarmed()
        if self._is_broken and not self._is_alarmed:
            self._board.raise_alarm()
        now = time.monotonic()
        pause_s = 0.0 if self._is_alarmed else self._interval_s
        if self._state != self._written_state or now - self._last_beat >= pause_s:
            self._written_state, self._last_beat = self._state, now
            self._board.beat(self._written_state)
            self._words.arm(self._config.heartbeat_deadline_s)
        is_closing = self._state == heartbeats.DONE and self._place.rank == 0
        if is_closing or now - self._last_look >= pause_s:
            self._look(now - self._last_look)
            self._last_look = now
        self._last_talk = time.monotonic()

    def _look(self, elapsed_s: float) -> None:
        """Rank 0 looks at all, the others at rank 0, whose store may outlive it."""
        self._beats = self._board.beats([0] if self._place.rank else range(self._place.world_size))
        lost, silent_s = self._judge.lost(self._beats, elapsed_s, is_alarmed=self._is_alarmed)
        if lost and lost[0] != self._place.rank:
            self._tell(self._lost(lost, f"no heartbeat for {silent_s:.0f} s"))
        elif self._place.rank == 0 and all(beat.state == heartbeats.DONE for beat in self._beats.values()):
            self._tell(Failure(0, self._place.host, heartbeats.OVER, "", (), time.time(), 0))

    def _lost(self, ranks: list[int], how: str) -> Failure:
        others = f" (and of rank {', '.join(map(str, sorted(ranks[1:])))})" if len(ranks) > 1 else ""
        hosts = heartbeats.lost_hosts(ranks, self._beats)
        host = self._beats[ranks[0]].host if ranks[0] in self._beats else ""
        return Failure(ranks[0], host, "lost", how + others, hosts, time.time())

    def _store_is_gone(self) -> None:
        """Rank 0 hosts the store, or its host does, so that one of them has ended."""
        if self._state == heartbeats.DONE or self._verdict is not None or self._closed.is_set():
            return
        self._verdict = self._lost([0], "its process is gone: it has closed the job's store")
        self._known.set()
        self._act(self._verdict)

    def _act(self, verdict: Failure) -> None:
        """On the verdict: end the process, unless this rank is ending already."""
        if verdict.kind != heartbeats.OVER:
            self._words.report(verdict)
            if verdict.kind in ("error", "signal") and verdict.rank != self._place.rank:
                self._tears_down.wait(SAME_ERROR_S)
        self._words.acknowledge(self._board, verdict)
        self._told.set()
        if verdict.kind != heartbeats.OVER and not self._tears_down.is_set():
            self._words.end(verdict)

    # The thread that measures time

    def _guard(self) -> None:
        tick_s, silent_s, last = self._interval_s / 2, 0.0, time.monotonic()
        while not self._closed.wait(tick_s):
            now = time.monotonic()
            # Where this process was itself suspended it has not listened.
            silent_s = min(now - self._last_talk, silent_s + min(now - last, 2 * tick_s))
            last = now
            if self._verdict is not None:
                self._guard_the_end(self._verdict)
                return
            if silent_s > self._config.heartbeat_deadline_s:
                gone = self._lost([0], f"the job's store at its host does not answer for {silent_s:.0f} s")
                self._words.report(gone)
                self._words.end(gone)
            phase = self._phase
            if now - phase.started > phase.limit_s:
                message = f"the phase {phase.name} has taken {now - phase.started:.0f} s without an end"
                self._tell(Failure(self._place.rank, self._place.host, "stall", message, (), time.time()))

    def _guard_the_end(self, verdict: Failure) -> None:
        """Teardown may hang in what the lost rank has left behind."""
        if verdict.kind != heartbeats.OVER and not self._closed.wait(LINGER_S + SAME_ERROR_S + TEARDOWN_S):
            self._words.end(verdict)
