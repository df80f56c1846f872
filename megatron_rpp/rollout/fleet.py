"""The SGLang servers of a run: some attached by URL, or some spawned beside the trainer."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_rpp import device
from megatron_rpp.config.schema import Config
from megatron_rpp.experience.types import UNSYNCED
from megatron_rpp.rollout.in_server.delta_loader import LOADER
from megatron_rpp.rollout.members import AttachedMember, Member, SpawnedMember
from megatron_rpp.rollout.probe import at_once
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.rollout.server_command import server_dtype
from megatron_rpp.rollout.sglang_server import SGLangServer
from megatron_rpp.rollout.urls_file import UrlsFile

logger = logging.getLogger(__name__)

_POLL_S = 0.2


@dataclass(frozen=True)
class Server:
    """A server that is healthy."""

    url: str
    tp_size: int
    device: str  # cpu | cuda
    version: int  # policy version it was last brought to; UNSYNCED: none, also after a restart

    @property
    def is_synced(self) -> bool:
        """Whether it holds a version that a sync has brought."""
        return self.version != UNSYNCED


class ServerFleet:
    """Rank 0's alone, without collectives, and used from its main thread (see sglang_server.py).

    No method may be called while generation is paused: a paused server does not answer its health check.
    """

    def __init__(self, config: Config) -> None:
        """Starts the spawned servers. Raises ConfigError for a port in use, a wrong urls_file, or float8 on CPU."""
        self._rollout = rollout = config.rollout
        self._urls_file = UrlsFile(rollout.urls_file) if rollout.urls_file else None
        self._members: list[Member] = [AttachedMember(url.rstrip("/"), rollout) for url in rollout.urls]
        if rollout.spawns_servers:
            spawned = [SpawnedMember(_server(config, index), rollout) for index in range(rollout.num_servers)]
            self._members = [*spawned]
            try:
                for member in spawned:  # they load while the trainer builds its models
                    member.start()
            except BaseException:
                self.stop()
                raise

    def wait_ready(self, at_least: int | None = None) -> None:
        """Wait until `at_least` servers are healthy; None: all of them.

        Raises RolloutError past rollout.startup_deadline_s, or where too many starts have failed; with the log's end.
        """
        end = time.monotonic() + self._rollout.startup_deadline_s
        failed: dict[Member, str] = {}
        while True:
            failed |= self._look(suspects=())
            wanted = max(len(self._members), 1) if at_least is None else at_least
            if len(self._serving()) >= wanted:
                return
            if failed and len(self._members) - len(failed) < wanted:
                raise RolloutError("\n".join(failed.values()))
            if time.monotonic() > end:
                raise RolloutError(self._not_ready(wanted))
            time.sleep(_POLL_S)

    def refresh(self, suspects: Collection[str] = ()) -> tuple[Server, ...]:
        """The healthy servers, in a stable order, after the dead and the silent were dropped and new ones taken in.

        `suspects` are URLs to be asked thoroughly, which takes rollout.health_deadline_s where one is silent; those
        that answer stay, UNSYNCED. What cannot be started is logged, and tried again at a later call.
        """
        for trouble in self._look(suspects).values():
            logger.warning("%s", trouble)
        return tuple(
            Server(member.url, member.info.tp_size, member.info.device, member.version)
            for member in self._members
            if member.info is not None
        )

    def mark(self, urls: Collection[str], version: int) -> None:
        """The servers at `urls` were brought to `version`."""
        for member in self._serving():
            if member.url in urls:
                member.version = version

    def drop(self, url: str, reason: str) -> None:
        """A spawned server is killed and starts again after its back-off; an attached one is left out until healthy."""
        for member in self._serving():
            if member.url == url:
                member.drop(reason)

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
            self._follow(self._urls_file.urls())
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

    def _follow(self, urls: Collection[str]) -> None:
        """Attached to exactly `urls`; those known already stay as they are."""
        known = {member.url: member for member in self._members}
        for url in known.keys() - set(urls):
            logger.info("rollout.urls_file names %s no more", url)
        self._members = [known.get(url) or AttachedMember(url, self._rollout) for url in urls]

    def _not_ready(self, wanted: int) -> str:
        troubles = [f"{m.url}: {m.trouble}" for m in self._members if m.info is None]
        return (
            f"{len(self._serving())} of {wanted} SGLang servers were healthy after rollout.startup_deadline_s="
            f"{self._rollout.startup_deadline_s:g} s; " + ("; ".join(troubles) or "rollout.urls_file names no other")
        )


def _server(config: Config, index: int) -> SGLangServer:
    """The spawned server `index`, not started."""
    rollout = config.rollout
    name = "sglang.txt" if rollout.num_servers == 1 else f"sglang-{index}.txt"
    return SGLangServer(
        model_path=config.model.path,
        rollout=rollout,
        dtype=server_dtype(config),
        log_path=Path(config.run.dir) / "logs" / name,
        device=device.current().type,
        trust_remote_code=config.model.trust_remote_code,
        base_gpu=index * rollout.server_tensor,
        weight_loader=LOADER if "delta" in config.weight_sync.transports else None,
        port=rollout.port and rollout.port + index,
    )
