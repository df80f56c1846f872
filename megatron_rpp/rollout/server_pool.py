"""The servers of one sampling call: who takes the next request, and who shows no sign of life."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp

from megatron_rpp.rollout.prefix_table import PrefixTable
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.rollout.shared_load import SharedLoad

logger = logging.getLogger(__name__)

T = TypeVar("T")
_LONGEST_PAUSE_S = 5.0  # between two probes of a server
# The policy of sglang-router's cache_aware: a server is preferred that has seen at least this share of the prompt,
# unless it is busier than the idlest one by more than so many requests and by more than this factor. The router's
# own 64 requests and 1.5 are for short answers; here the prompt is a small part of the work.
_SHARE_SEEN, _MORE_REQUESTS, _MORE_TIMES = 0.3, 1, 1.1


class ServerLost(Exception):
    """The server of a request was given up while it ran; ask another."""


@dataclass(frozen=True)
class Work:
    """One request, as far as it matters who takes it."""

    token_ids: Sequence[int]  # of its prompt
    load: int  # tokens that its samples may come to, prompts and responses
    turn: int  # which of equally suitable servers takes it


@dataclass(eq=False)
class PoolServer:
    """One server as this call sees it."""

    url: str
    running: dict[asyncio.Task[Any], int] = field(default_factory=dict)  # request -> its load
    failures: int = 0  # a server that fails fast must not look like the least busy one
    has_failed_last: bool = False  # the newest request that it ended, it failed
    cause: str | None = None  # why it is asked no more

    @property
    def load(self) -> int:
        """Tokens that this call has in flight there."""
        return sum(self.running.values())


class ServerPool:
    """Servers are taken until they are given up; a watcher for each gives up the silent ones."""

    def __init__(
        self,
        urls: Sequence[str],
        health_deadline_s: float,
        session: aiohttp.ClientSession,
        shared: SharedLoad | None = None,
    ) -> None:
        """shared: what other replicas have in flight counts too; None: there is no other."""
        self._servers = [PoolServer(url) for url in urls]
        self._deadline_s, self._session, self._shared = health_deadline_s, session, shared
        self._prefixes = PrefixTable()

    @property
    def suspects(self) -> set[str]:
        """URLs of the servers that were given up, or that failed a request and have answered none since."""
        return {server.url for server in self._servers if server.cause is not None or server.has_failed_last}

    def left(self) -> list[PoolServer]:
        """The servers that may be asked. Raises RolloutError where there is none, with every server's reason."""
        left = [server for server in self._servers if server.cause is None]
        if not left:
            causes = "; ".join(f"{server.url}: {server.cause}" for server in self._servers)
            raise RolloutError(f"no SGLang server is left to sample from: {causes}")
        return left

    def pick(self, work: Work, failed: Sequence[str]) -> PoolServer:
        """Of the servers that have failed this request (`failed`: URLs) least: the least busy one that has seen the
        beginning of its prompt, or the least busy of all where that has clearly less to do.
        """
        left = self.left()
        fewest = min(failed.count(server.url) for server in left)
        turns = left[work.turn % len(left) :] + left[: work.turn % len(left)]
        able = [server for server in turns if failed.count(server.url) == fewest]
        loads = self._loads(able, work)
        idlest = min(able, key=lambda server: loads[server.url])
        limit = max(loads[idlest.url] + _MORE_REQUESTS * work.load, _MORE_TIMES * loads[idlest.url])
        seen = self._prefixes.known(work.token_ids)
        enough = _SHARE_SEEN * len(work.token_ids)
        near = [s for s in able if seen.get(s.url, 0) >= max(enough, 1) and loads[s.url] <= limit]
        return min(near, key=lambda server: (-seen[server.url], loads[server.url])) if near else idlest

    def _loads(self, servers: Sequence[PoolServer], work: Work) -> dict[str, int]:
        """URL -> tokens in flight; a failure counts as one more request like `work`."""
        shared = self._shared.look([server.url for server in servers]) if self._shared is not None else {}
        return {s.url: shared.get(s.url, s.load) + s.failures * work.load for s in servers}

    def give_up(self, server: PoolServer, cause: str) -> None:
        """Ask it no more, and free the requests that it holds."""
        if server.cause is None:
            logger.warning("%s is asked no more in this step: %s", server.url, cause)
            server.cause = cause
        for task in server.running:
            task.cancel()

    async def run(self, server: PoolServer, work: Work, request: Coroutine[Any, Any, T]) -> T:
        """Result of a request to `server`. Raises what it raised, or ServerLost."""
        if server.cause is not None:  # since it was picked
            request.close()
            raise ServerLost(server.url)
        task = asyncio.create_task(request)
        self._prefixes.add(server.url, work.token_ids)
        with self._counted(server, task, work.load):
            try:
                await asyncio.wait([task])
            finally:
                task.cancel()  # nothing where it is done
        if task.cancelled():
            raise ServerLost(server.url)
        return task.result()

    @contextmanager
    def _counted(self, server: PoolServer, task: asyncio.Task[Any], load: int) -> Iterator[None]:
        """Inside, the request is in flight."""
        server.running[task] = load
        if self._shared is not None:
            self._shared.add(server.url, load)
        try:
            yield
        finally:
            server.running.pop(task, None)
            if self._shared is not None:
                self._shared.add(server.url, -load)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Inside, every server is probed now and then."""
        watchers = [asyncio.create_task(self._watch(server)) for server in self._servers]
        try:
            yield
        finally:
            for watcher in watchers:
                watcher.cancel()

    async def _watch(self, server: PoolServer) -> None:
        last_sign, is_failing = time.monotonic(), False
        while server.cause is None:
            left_s = last_sign + self._deadline_s - time.monotonic()
            if is_failing and left_s <= 0:
                self.give_up(server, f"no sign of life for rollout.health_deadline_s={self._deadline_s:g} s")
                return
            try:
                # Half the deadline even where nothing is left: this process itself may have been held up.
                async with asyncio.timeout(max(left_s, self._deadline_s / 2)):
                    is_failing = not await self._is_alive(server.url)
            except aiohttp.ClientConnectorError as error:
                self.give_up(server, str(error))
                return
            except (aiohttp.ClientError, OSError, ValueError):  # a TimeoutError is an OSError
                is_failing = True
            if not is_failing:
                last_sign = time.monotonic()
            await asyncio.sleep(min(self._deadline_s / 5, _LONGEST_PAUSE_S))

    async def _is_alive(self, url: str) -> bool:
        # Not /health: on an idle server it samples a greedy token, and a batch that this was part of takes SGLang's
        # path for top-k until it has drained, which draws other tokens from the same seeds (0.5.23).
        # /server_info asks the scheduler too, and leaves sampling alone.
        async with self._session.get(f"{url.rstrip('/')}/server_info") as response:
            return response.status == 200
