"""The SGLang servers of a run: attached by URL, announced in the job's store, or spawned beside the trainer."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from megatron_rpp.config.schema import Config
from megatron_rpp.experience.types import UNSYNCED
from megatron_rpp.rollout.members import AttachedMember, Member, SpawnedMember
from megatron_rpp.rollout.probe import ServerInfo, at_once
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.rollout.registry import Registry
from megatron_rpp.rollout.run_server import run_server
from megatron_rpp.rollout.urls_file import UrlsFile

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_NO_OTHER = {
    False: "rollout.urls_file names no other",
    True: "no other has announced itself; start it with `rpp serve` and the same run.dir",
}


@dataclass(frozen=True)
class Server:
    """A server that is healthy."""

    url: str
    info: ServerInfo
    version: int  # policy version it was last brought to; UNSYNCED: none, also after a restart

    @property
    def tp_size(self) -> int:
        return self.info.tp_size

    @property
    def device(self) -> str:
        return self.info.device

    @property
    def is_synced(self) -> bool:
        """Whether it holds a version that a sync has brought."""
        return self.version != UNSYNCED


class ServerFleet:
    """Rank 0's alone, without collectives, and used from its main thread (see sglang_server.py).

    No method may be called while generation is paused: a paused server does not answer its health check.
    """

    def __init__(self, config: Config, registry: Registry | None = None) -> None:
        """Starts the spawned servers. Raises ConfigError for a port in use, a wrong urls_file, or float8 on CPU.

        registry: where servers announce themselves, with rollout.registry.
        """
        self._rollout = rollout = config.rollout
        assert (registry is not None) == rollout.registry
        self._registry = registry
        self._urls_file = UrlsFile(rollout.urls_file) if rollout.urls_file else None
        self._members: list[Member] = [AttachedMember(url.rstrip("/"), rollout) for url in rollout.urls]
        if rollout.spawns_servers:
            spawned = [_spawned(config, index) for index in range(rollout.num_servers)]
            self._members = [*spawned]
            try:
                for member in spawned:  # they load while the trainer builds its models
                    member.start()
            except BaseException:
                self.stop()
                raise

    def wait_ready(self, at_least: int | None = None) -> None:
        """Wait until `at_least` servers are healthy; None: all of them.

        Of servers that announce themselves, all are rollout.num_servers; past rollout.startup_deadline_s it goes on
        with any. Raises RolloutError past it, or where too many starts have failed; with the log's end.
        """
        end = time.monotonic() + self._rollout.startup_deadline_s
        failed: dict[Member, str] = {}
        while True:
            failed |= self._look(suspects=())
            wanted = self._wanted() if at_least is None else at_least
            if len(self._serving()) >= wanted:
                return
            if failed and len(self._members) - len(failed) < wanted:
                raise RolloutError("\n".join(failed.values()))
            if time.monotonic() > end:
                if self._registry is None or not self._serving():
                    raise RolloutError(self._not_ready(wanted))
                logger.warning("%s; the run goes on with those", self._not_ready(wanted))
                return
            time.sleep(_POLL_S)

    def refresh(self, suspects: Collection[str] = ()) -> tuple[Server, ...]:
        """The healthy servers, in a stable order, after the dead and the silent were dropped and new ones taken in.

        `suspects` are URLs to be asked thoroughly, which takes rollout.health_deadline_s where one is silent; those
        that answer stay, UNSYNCED. What cannot be started is logged, and tried again at a later call.
        """
        for trouble in self._look(suspects).values():
            logger.warning("%s", trouble)
        return tuple(
            Server(member.url, member.info, member.version) for member in self._members if member.info is not None
        )

    def mark(self, urls: Collection[str], version: int) -> None:
        """The servers at `urls` were brought to `version`."""
        for member in self._serving():
            if member.url in urls:
                member.version = version

    def drop(self, url: str, reason: str, lost_s: float = 0.0) -> None:
        """After a back-off a spawned server, which is killed, starts again, and an attached one is looked at again.

        lost_s: what it has cost the run, as Backoff.failed's.
        """
        for member in self._serving():
            if member.url == url:
                member.drop(reason, lost_s)

    def stop(self) -> None:
        """Stop what was spawned; attached servers run on."""
        for member in self._members:
            if isinstance(member, SpawnedMember):
                member.stop()

    def _serving(self) -> list[Member]:
        return [member for member in self._members if member.info is not None]

    def _look(self, suspects: Collection[str]) -> dict[Member, str]:
        """Ask all at once, then act on each answer; the starts that failed."""
        if self._urls_file is not None:
            self._follow((url, 0) for url in self._urls_file.urls())
        if self._registry is not None:
            self._follow((entry.url, entry.slot) for entry in self._registry.entries())
        seen = at_once(lambda member: member.look(is_suspect=member.url in suspects), self._members)
        failed = {}
        for member, answer in zip(self._members, seen, strict=True):
            if member.url in suspects:
                member.version = UNSYNCED
            try:
                member.settle(answer)
            except RolloutError as error:
                failed[member] = str(error)
        return failed

    def _follow(self, servers: Iterable[tuple[str, int]]) -> None:
        """Attached to exactly `servers`, pairs of URL and incarnation; those known already stay as they are."""
        known = {member.identity: member for member in self._members}
        wanted = list(dict.fromkeys(servers))
        for url, _ in known.keys() - set(wanted):
            logger.info("the SGLang server at %s has left", url)
        self._members = [known.get(each) or AttachedMember(each[0], self._rollout, each[1]) for each in wanted]

    def _wanted(self) -> int:
        return self._rollout.num_servers if self._registry is not None else max(len(self._members), 1)

    def _not_ready(self, wanted: int) -> str:
        troubles = [f"{m.url}: {m.trouble}" for m in self._members if m.info is None]
        return (
            f"{len(self._serving())} of {wanted} SGLang servers were healthy after rollout.startup_deadline_s="
            f"{self._rollout.startup_deadline_s:g} s; " + ("; ".join(troubles) or _NO_OTHER[self._registry is not None])
        )


def _spawned(config: Config, index: int) -> SpawnedMember:
    """The server `index` beside the trainer, not started."""
    rollout = config.rollout
    name = "sglang.txt" if rollout.num_servers == 1 else f"sglang-{index}.txt"
    return SpawnedMember(run_server(config, index, name, base_gpu=index * rollout.server_tensor), rollout)
