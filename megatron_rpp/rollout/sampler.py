"""One phase of sampling: requests that go to the servers, fail over, and are aborted on the servers when cancelled."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import aiohttp

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.http_failure import HttpFailure, reply_message
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.rollout.replies import check_samples, other_versions
from megatron_rpp.rollout.server_pool import ServerLost, ServerPool, Work
from megatron_rpp.rollout.shared_load import SharedLoad

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.25
_MAX_BACKOFF_S = 8.0
_ABORT_S, _ABORT_A_SAMPLE_S = 3.0, 0.02
Samples = list[dict[str, Any]]


class Flight(NamedTuple):
    """When a request was with the servers, in seconds since its phase began."""

    start: float
    end: float
    samples: int


class Sampler:
    """Of one event loop: made once its servers are known, and finished by `finish`."""

    def __init__(
        self,
        urls: Sequence[str],
        rollout: RolloutConfig,
        version: int | None,
        session: aiohttp.ClientSession,
        shared: SharedLoad | None = None,
    ) -> None:
        """version: the policy version that every sampled token must come from; None: any. shared: of ServerPool."""
        self.pool = ServerPool(urls, rollout.health_deadline_s, session, shared)
        self.flights: list[Flight] = []  # of the requests that have ended, aborted ones too
        self._rollout, self._version, self._session = rollout, version, session
        self._aborts: set[asyncio.Task[None]] = set()
        self._num_aborted = 0  # samples
        self._refusing: set[str] = set()  # URLs of servers that would not abort
        self._began = time.monotonic()

    async def send(self, payload: dict[str, Any], turn: int) -> Samples:
        """One prompt's samples, from the first server that gives them.

        It may fail max_retries + 1 times, but is tried on every server that is left. Servers given up do not count.
        Where it is cancelled the servers stop sampling. A partial rollout would be kept there: the reply to an
        aborted request has the tokens so far with their version spans, and `check_samples` refuses it today.
        """
        work, start = _work(payload, turn), time.monotonic()
        try:
            return await self._send(payload, work)
        finally:
            times = (start - self._began, time.monotonic() - self._began)
            self.flights.append(Flight(*times, len(payload["input_ids"])))

    async def finish(self) -> None:
        """Wait until the servers have heard of what was cancelled, but not long: a sync waits for them anyway."""
        if self._aborts:
            limit_s = min(_ABORT_S + _ABORT_A_SAMPLE_S * self._num_aborted, self._rollout.health_deadline_s)
            _, late = await asyncio.wait(self._aborts, timeout=limit_s)
            for task in late:
                task.cancel()

    async def _send(self, payload: dict[str, Any], work: Work) -> Samples:
        failed: list[str] = []  # URLs
        while True:
            server = self.pool.pick(work, failed)
            if again := failed.count(server.url):
                await asyncio.sleep(min(_FIRST_BACKOFF_S * 2 ** (again - 1), _MAX_BACKOFF_S))
            names = _new_names(len(payload["input_ids"]))
            try:
                samples = await self.pool.run(server, work, self._request(server.url, payload | {"rid": names}))
            except ServerLost:
                continue
            except asyncio.CancelledError:
                self._num_aborted += len(names)
                self._aborts.add(asyncio.create_task(self._abort(server.url, names)))
                raise
            except aiohttp.ClientConnectorError as error:
                self.pool.give_up(server, str(error))
            except (aiohttp.ClientError, OSError, HttpFailure, ValueError) as error:
                cause = f"{server.url}/generate: {str(error) or type(error).__name__}"
                if isinstance(error, HttpFailure) and not error.is_transient:
                    raise RolloutError(cause) from error
                failed.append(server.url)
                server.failures, server.has_failed_last = server.failures + 1, True
                self._raise_if_hopeless(failed, cause)
            else:
                server.has_failed_last = False
                if self._version is None or not (others := other_versions(samples, self._version)):
                    return samples
                self.pool.give_up(server, f"samples from version {min(others)}, not {self._version}")

    async def _request(self, url: str, payload: dict[str, Any]) -> Samples:
        async with self._session.post(f"{url.rstrip('/')}/generate", json=payload) as response:
            if response.status != 200:
                raise HttpFailure(response.status, reply_message(await response.text()))
            samples = check_samples(await response.json(content_type=None))
        asked = len(payload["input_ids"])
        if len(samples) != asked:
            raise RolloutError(f"{url}/generate: {len(samples)} samples of {asked} asked came back")
        return samples

    async def _abort(self, url: str, names: Sequence[str]) -> None:
        """SGLang knows each sample of a request by its own name, and forgets those that have ended."""

        async def abort(name: str) -> None:
            with suppress(aiohttp.ClientError, OSError):  # a server that is gone samples no more
                async with self._session.post(f"{url.rstrip('/')}/abort_request", json={"rid": name}) as response:
                    if response.status != 200 and url not in self._refusing:
                        self._refusing.add(url)
                        words = reply_message(await response.text())
                        logger.warning("%s goes on with what was aborted: HTTP %d: %s", url, response.status, words)

        await asyncio.gather(*map(abort, names))

    def _raise_if_hopeless(self, failed: Sequence[str], cause: str) -> None:
        left = self.pool.left()
        if len(failed) > self._rollout.max_retries and all(server.url in failed for server in left):
            for server in left:
                self.pool.give_up(server, cause)
            raise RolloutError(f"{cause} (after rollout.max_retries={self._rollout.max_retries} retries)")


def open_session() -> aiohttp.ClientSession:
    """The HTTP session of one phase."""
    # A connection is used once: SGLang closes idle ones after 5 s, and a request that met this would look like
    # one that the server has lost. The deadline of the whole call is the only one.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


def _work(payload: dict[str, Any], turn: int) -> Work:
    prompts, params = payload["input_ids"], payload["sampling_params"]
    load = sum(len(ids) + each["max_new_tokens"] for ids, each in zip(prompts, params, strict=True))
    return Work(prompts[0] if prompts else (), load, turn)


def _new_names(count: int) -> list[str]:
    """All of one length: SGLang aborts every request whose name begins with the given one."""
    return [uuid.uuid4().hex for _ in range(count)]
