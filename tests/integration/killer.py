"""Kills one of two servers at a seeded random moment of a training step, again and again."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from threading import Timer
from typing import Any
from unittest.mock import patch

from megatron_rpp.rollout.members import SpawnedMember
from megatron_rpp.session import Session

STEPS_BETWEEN = 7  # that the run takes at least before it waits for a server, which then starts faster


@dataclass(frozen=True)
class Kill:
    """Of a server that served beside another."""

    step: int
    phase: str  # rollout | sync; empty: it came between two
    served: int  # requests that the victim had answered


class Killer:
    """Strikes only where both servers have served a whole step; then not again before they have done so anew."""

    def __init__(self, session: Session, seed: int) -> None:
        self._session, self._random = session, random.Random(seed)
        self._phase, self._lasted = "", {"rollout": 0.2, "sync": 0.2}  # how long each was, when last
        self._wanted = self._random.sample(["rollout", "sync"] * 2, 4)
        self._pair: list[str] = []  # who served together at the end of the last step
        self._strike: tuple[str, Callable[[], None]] | None = None  # in which phase
        self._timer: Timer | None = None
        self.kills: list[Kill] = []

    @property
    def is_content(self) -> bool:
        """Four were killed; some while they sampled, some in a sync."""
        return len(self.kills) >= 4 and {"rollout", "sync"} <= {kill.phase for kill in self.kills}

    @property
    def wants_both(self) -> bool:
        """The steps go on with one server only so long."""
        return not self.is_content and len(self._serving()) < 2

    def report(self) -> list[dict[str, Any]]:
        return [asdict(kill) for kill in self.kills]

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """`step` is run in here, and maybe struck."""
        serving = self._serving()
        if len(serving) == 2 and serving == self._pair and not self.is_content:
            self._aim(step, self._random.choice(serving))
        original = Session.phase
        watched = contextmanager(lambda session, name: self._watch(original(session, name), name))
        with patch.object(Session, "phase", watched):
            yield
        if self._timer is not None:
            self._timer.join()
        self._strike = self._timer = None
        self._pair = serving if serving == self._serving() else []

    def _aim(self, step: int, victim: str) -> None:
        member = next(m for m in self._members() if m.url == victim)
        pid, log = member._server.pid, member._server.log_tail(lines=10**6)
        assert pid is not None
        missing = [phase for phase in ("rollout", "sync") if phase not in {kill.phase for kill in self.kills}]
        phase = self._wanted.pop() if self._wanted else missing[0]
        self._strike = phase, lambda: self._kill(pid, step, log.count("POST /generate"))

    def _watch(self, body: Any, name: str) -> Iterator[None]:
        """The phase `name`, whose code is run in `body`."""
        if name not in self._lasted:
            with body:
                yield
            return
        self._phase, start = name, time.monotonic()
        if self._strike is not None and self._strike[0] == name:
            self._timer = Timer(self._random.uniform(0, 0.9) * self._lasted[name], self._strike[1])
            self._timer.start()
        with body:
            yield
        self._phase = ""
        if self._strike is None:
            self._lasted[name] = time.monotonic() - start

    def _kill(self, group: int, step: int, served: int) -> None:
        phase = self._phase
        os.killpg(group, signal.SIGKILL)
        self.kills.append(Kill(step, phase if phase == self._phase else "", served))

    def _members(self) -> list[SpawnedMember]:
        fleet = self._session.rollout_engine._fleet._fleet
        assert fleet is not None
        return [member for member in fleet._members if isinstance(member, SpawnedMember)]

    def _serving(self) -> list[str]:
        return [server.url for server in self._session.rollout_engine._serving()]
