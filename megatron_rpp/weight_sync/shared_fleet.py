"""The server fleet as all ranks see it: rank 0 asks and acts, the others learn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from megatron_rpp.config.schema import RolloutConfig
from megatron_rpp.rollout import control
from megatron_rpp.rollout.fleet import Server, ServerFleet
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.weight_sync.phases import Phases, for_each_server
from megatron_rpp.weight_sync.transport import Deadline

T = TypeVar("T")


class SharedFleet:
    """Every method is a collective over all ranks, but `suspect`, which all ranks call alike."""

    def __init__(self, fleet: ServerFleet | None, phases: Phases, rollout: RolloutConfig) -> None:
        """fleet: on rank 0; None elsewhere."""
        self._fleet, self._phases, self._rollout = fleet, phases, rollout
        self._suspects: set[str] = set()
        self.known: tuple[Server, ...] = ()  # the healthy ones, when last asked
        self.released: frozenset[str] = frozenset()  # URLs of those that have given their memory back

    @property
    def has_released_memory(self) -> bool:
        return bool(self.released)

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
        self.released &= {server.url for server in self.known if server.version >= 0}
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
        self.released -= urls

    def drop(self, servers: Sequence[Server], reason: str) -> None:
        """Do without `servers` until they have been started again, or answer anew."""
        urls = {server.url for server in servers}
        if self._fleet is not None:
            for url in urls:
                self._fleet.drop(url, reason)
        self.known = tuple(server for server in self.known if server.url not in urls)

    def release_memory(self) -> None:
        """All servers give their memory back."""
        release = partial(
            for_each_server, self.known, lambda server, end: control.release_memory(server.url, end.left_s())
        )
        self._phases.run(self._phases.deadline("release memory"), release if self._fleet is not None else None)
        self.released = frozenset(server.url for server in self.known)

    def _ask(self, question: Callable[[ServerFleet], T]) -> T:
        """What rank 0's fleet answers. A RolloutError there is raised on every rank."""
        patience = self._rollout.startup_deadline_s + 2 * self._rollout.health_deadline_s
        answer: tuple[T | None, str | None] = (None, None)
        if self._fleet is not None:
            try:
                answer = (question(self._fleet), None)
            except RolloutError as error:
                answer = (None, str(error))
        value, failed = self._phases.gather(Deadline("servers", patience), answer)[0]
        if failed is not None:
            raise RolloutError(failed)
        return value  # type: ignore[no-any-return]


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
