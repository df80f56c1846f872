"""The server fleet as all ranks see it: rank 0 asks and acts, the others learn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.parallel.collectives import words_of
from megatron_rpp.rollout import control
from megatron_rpp.rollout.fleet import Server, ServerFleet
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.weight_sync.phases import Phases, for_each_server
from megatron_rpp.weight_sync.transport import Deadline, OutOfStepError, WeightSyncError

T = TypeVar("T")
logger = logging.getLogger(__name__)


class SharedFleet:
    """Every method is a collective over all ranks, but `suspect`, which all ranks call alike."""

    def __init__(self, fleet: ServerFleet | None, phases: Phases, rollout: RolloutConfig) -> None:
        """fleet: on rank 0; None elsewhere."""
        self._fleet, self._phases, self._rollout = fleet, phases, rollout
        self._suspects: set[str] = set()
        self.known: tuple[Server, ...] = ()  # the healthy ones, when last asked
        self.released: dict[str, set[str]] = {}  # on rank 0: URL -> memory that a server has yet to take again
        self.has_released_memory = False  # since the last sync; then no server holds weights

    def wait_ready(self) -> None:
        """Wait for all servers. Raises RolloutError on every rank where one does not start."""
        self._ask(lambda fleet: fleet.wait_ready())
        self.servers()

    def servers(self) -> tuple[Server, ...]:
        """The healthy servers; where there is none, waits for one. Raises RolloutError on every rank."""
        self.known = self._ask(
            partial(_healthy, suspects=frozenset(self._suspects), starts=self._rollout.max_retries + 1)
        )
        self._suspects.clear()
        for server in self.known:
            if not server.is_synced:  # started again, with all its memory
                self.released.pop(server.url, None)
        return self.known

    def suspect(self, urls: Iterable[str]) -> None:
        """These will be asked thoroughly before they are used again."""
        self._suspects |= set(urls)

    def mark(self, servers: Sequence[Server], version: int) -> None:
        """`servers` hold `version`, verified."""
        urls = {server.url for server in servers}
        if self._fleet is not None:
            self._fleet.mark(urls, version)
        self.known = tuple(replace(s, version=version) if s.url in urls else s for s in self.known)
        self.has_released_memory = False

    def drop(self, servers: Sequence[Server], reason: str, lost_s: float = 0.0) -> None:
        """Do without `servers` until they have been started again, or answer anew. lost_s: as ServerFleet.drop's."""
        urls = {server.url for server in servers}
        if self._fleet is not None:
            for url in urls:
                self._fleet.drop(url, reason, lost_s)
        self.known = tuple(server for server in self.known if server.url not in urls)

    def release_memory(self) -> None:
        """All servers give their memory back. One that does not is a suspect."""
        deadline = self._phases.deadline("release memory")
        release = partial(for_each_server, self.known, _release_memory)
        try:
            self._phases.run(deadline, release if self._fleet is not None else None)
        except OutOfStepError:
            raise
        except WeightSyncError as error:
            logger.warning("%s", error)
            self.drop([server for server in self.known if server.url in error.servers], str(error))
        self.released = {server.url: set(control.MEMORY) for server in self.known}
        self.has_released_memory = True

    def _ask(self, question: Callable[[ServerFleet], T]) -> T:
        """What rank 0's fleet answers. An error there is raised on every rank."""
        starts = self._rollout.max_retries + 1
        patience = starts * self._rollout.startup_deadline_s + 2 * self._rollout.health_deadline_s
        answer: tuple[T | None, str | None] = (None, None)
        if self._fleet is not None:
            try:
                answer = (question(self._fleet), None)
            except Exception as error:  # whatever it is: the other ranks wait to hear of it
                answer = (None, words_of(error, RolloutError))
        value, failed = self._phases.gather(Deadline("servers", patience), answer)[0]
        if failed is not None:
            raise RolloutError(failed)
        return value  # type: ignore[no-any-return]


def _release_memory(server: Server, deadline: Deadline) -> None:
    control.release_memory(server.url, deadline.left_s())


def _healthy(fleet: ServerFleet, suspects: frozenset[str], starts: int) -> tuple[Server, ...]:
    """Those that are healthy now; if there are none, the first that comes. A failed start is tried again."""
    servers = fleet.refresh(suspects)
    while not servers:
        try:
            fleet.wait_ready(at_least=1)
        except RolloutError:
            if (starts := starts - 1) <= 0:
                raise
        servers = fleet.refresh()
    return servers
