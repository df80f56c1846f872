"""One server of the fleet, spawned or attached: whether it serves, and what brings it back."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.experience.types import UNSYNCED
from megatron_rpp.rollout.backoff import Backoff
from megatron_rpp.rollout.http import post_json
from megatron_rpp.rollout.probe import ServerInfo, accepts_connections, examine
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.rollout.sglang_server import SGLangServer

logger = logging.getLogger(__name__)

_BRIEF_S = 5.0  # for one that does not serve: if it is only slow, the next look will find it


class Member(ABC):
    """`look` may run in any thread, as it changes nothing in here; everything else belongs to the main thread."""

    def __init__(self, rollout: RolloutConfig) -> None:
        self._rollout = rollout
        self.info: ServerInfo | None = None  # where it serves
        self.version = UNSYNCED
        self.trouble = "it has not answered yet"  # why it does not serve

    @property
    @abstractmethod
    def url(self) -> str:
        """Base URL, without a slash at its end."""

    @property
    def identity(self) -> tuple[str, int]:
        """(URL, incarnation): a server that others start again at its URL is another member."""
        return self.url, 0

    @abstractmethod
    def drop(self, reason: str, lost_s: float = 0.0) -> None:
        """Serve no more until a back-off is over. lost_s: as Backoff.failed's."""

    @abstractmethod
    def settle(self, seen: ServerInfo | str) -> None:
        """Act on what `look` saw. Raises RolloutError where a start has failed for good."""

    def look(self, *, is_suspect: bool) -> ServerInfo | str:
        """What it says of itself, or why it cannot serve. Only a suspect is waited for, rollout.health_deadline_s."""
        if self.info is None:
            return examine(self.url, min(_BRIEF_S, self._rollout.health_deadline_s))
        if not is_suspect and accepts_connections(self.url):
            return self.info
        return examine(self.url, self._rollout.health_deadline_s)

    def _serve(self, info: ServerInfo) -> None:
        if self.info is None:
            logger.info("the SGLang server at %s is ready: %s", self.url, info)
        self.info = info

    def _leave(self, reason: str) -> None:
        self.info, self.version, self.trouble = None, UNSYNCED, reason


class AttachedMember(Member):
    """A server that somebody else runs: left out while it is not healthy, and for a while once it was dropped."""

    def __init__(self, url: str, rollout: RolloutConfig, incarnation: int = 0) -> None:
        """incarnation: differs from one process at `url` to the next, where somebody tells them apart; else 0."""
        super().__init__(rollout)
        self._url, self._incarnation = url, incarnation
        self._backoff = Backoff(rollout.restart_backoff_s)

    @property
    def url(self) -> str:
        return self._url

    @property
    def identity(self) -> tuple[str, int]:
        return self._url, self._incarnation

    def look(self, *, is_suspect: bool) -> ServerInfo | str:
        """As Member's, but not during its back-off; and one that is not well is told to sample again."""
        if self.info is None and not self._backoff.is_due:
            return self.trouble
        seen = super().look(is_suspect=is_suspect)
        if self.info is None and isinstance(seen, str) and accepts_connections(self.url):
            # A trainer that died in a sync, or a sync that failed, may have left it paused; then it never gets well.
            with contextlib.suppress(RolloutError):
                post_json(self.url, "continue_generation", {}, _BRIEF_S)
        return seen

    def drop(self, reason: str, lost_s: float = 0.0) -> None:
        wait_s = self._backoff.failed(lost_s)
        logger.warning("the SGLang server at %s is left out, to be tried again in %g s: %s", self.url, wait_s, reason)
        self._leave(reason)

    def settle(self, seen: ServerInfo | str) -> None:
        if isinstance(seen, ServerInfo):
            if self.version != UNSYNCED:  # it was brought to a version, and is well after the step that used it
                self._backoff.reset()
            self._serve(seen)
            return
        if self.info is not None:
            logger.warning("the SGLang server at %s is left out until it is healthy: %s", self.url, seen)
        self._leave(seen)


class SpawnedMember(Member):
    """A server beside the trainer: started, killed where it does not answer, and started again."""

    def __init__(self, server: SGLangServer, rollout: RolloutConfig) -> None:
        super().__init__(rollout)
        self._server = server
        self._backoff = Backoff(rollout.restart_backoff_s)

    @property
    def url(self) -> str:
        return self._server.url

    def start(self) -> None:
        """Raises ConfigError where rollout.port is in use."""
        self._server.start()

    def stop(self) -> None:
        self._server.stop()

    @property
    def is_alive(self) -> bool:
        """Whether its process runs."""
        return self._server.is_alive()

    def forget_failures(self) -> None:
        """It has proven itself: should it die, it is started again as soon as the first time."""
        self._backoff.reset()

    def look(self, *, is_suspect: bool) -> ServerInfo | str:
        if not self._server.is_alive():
            return self._server.ending or self.trouble
        return super().look(is_suspect=is_suspect)

    def drop(self, reason: str, lost_s: float = 0.0) -> None:
        self._server.stop()
        wait_s = self._backoff.failed(lost_s)
        logger.warning("the SGLang server at %s is down, to start again in %g s: %s", self.url, wait_s, reason)
        self._leave(reason)

    def settle(self, seen: ServerInfo | str) -> None:
        if isinstance(seen, ServerInfo):
            if self.version != UNSYNCED:  # it was brought to a version, and is well after the step that used it
                self._backoff.reset()
            self._serve(seen)
        elif self.info is not None:
            self.drop(seen)
        elif self._server.pid is not None:
            self._try(lambda: self._server.check_start(self._rollout.startup_deadline_s))
        elif self._backoff.is_due:
            self._try(self._server.start)

    def _try(self, step: Callable[[], None]) -> None:
        """A step of starting. Raises RolloutError where it failed; the next attempt waits for its back-off."""
        try:
            step()
        except (RolloutError, ValueError, OSError) as error:
            self._backoff.failed()
            self._leave(str(error))
            raise RolloutError(str(error)) from error
