"""Scores from HTTP services: batches of items, several in flight, sent again where that may help."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp

from megatron_rpp.http_failure import HttpFailure, reply_message
from megatron_rpp.reward.protocol import RewardError

_IN_FLIGHT = 8  # requests, for each server
_FIRST_BACKOFF_S = 0.25
_MAX_BACKOFF_S = 4.0
_MAX_QUOTE = 200  # characters of a reply that an error repeats


Read = Callable[[Any, int], list[float]]
"""(decoded reply, number of responses in the request) -> their scores. Raises ValueError for a malformed reply."""


class Request(NamedTuple):
    """What is sent together."""

    payload: object  # posted as JSON
    responses: int  # in it


@dataclass(frozen=True)
class Service:
    """Where scores come from, and how long they are waited for."""

    urls: tuple[str, ...]  # posted to as they are; any of them answers any request
    deadline_s: float  # for a whole call
    max_retries: int
    is_restarted: bool = False  # somebody starts it again: where nobody listens, ask until the deadline

    def score(self, requests: Sequence[Request], read: Read) -> list[float]:
        """The scores of all requests, end to end.

        Raises:
            RewardError: a reply that cannot be read or that refuses the request, a request that failed
                max_retries + 1 times, or no end by the deadline.
        """
        return _in_own_loop(lambda: _Call(self, read).score(requests)) if requests else []


class _Call:
    """One call of `Service.score`."""

    def __init__(self, service: Service, read: Read) -> None:
        self._service, self._read = service, read
        self._running: Counter[str] = Counter()  # requests in flight by URL
        self._done = 0  # requests
        self._trouble = ""  # the newest

    async def score(self, requests: Sequence[Request]) -> list[float]:
        service, free = self._service, asyncio.Semaphore(_IN_FLIGHT * len(self._service.urls))

        async def one(request: Request) -> list[float]:
            async with free:
                scores = await self._send(session, request)
            self._done += 1
            return scores

        # A connection is used once: a server may close an idle one just as the next request goes out.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        # A server that accepts requests and never answers costs half of the time; another may take over then.
        limit = aiohttp.ClientTimeout(total=service.deadline_s / 2)
        async with aiohttp.ClientSession(connector=connector, timeout=limit) as session:
            try:
                async with asyncio.timeout(service.deadline_s), asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(request)) for request in requests]
            except TimeoutError as error:
                raise RewardError(self._too_late(len(requests))) from error
            except ExceptionGroup as group_error:
                raise group_error.exceptions[0] from None  # the others were cancelled or say the same
        return [score for task in tasks for score in task.result()]

    async def _send(self, session: aiohttp.ClientSession, request: Request) -> list[float]:
        """Scores of one request. Every server is tried, and max_retries + 1 times in all."""
        body = json.dumps(request.payload, default=str).encode()
        service, failed, waited = self._service, Counter[str](), 0
        while True:
            url = min(service.urls, key=lambda url: (failed[url], self._running[url]))
            if failed[url]:
                await asyncio.sleep(min(_FIRST_BACKOFF_S * 2 ** (failed[url] - 1), _MAX_BACKOFF_S))
            try:
                return self._scores(url, await self._post(session, url, body), request.responses)
            except (aiohttp.ClientError, OSError, HttpFailure) as error:  # a TimeoutError is an OSError
                self._trouble = f"{url}: {str(error) or type(error).__name__}"
                if isinstance(error, HttpFailure) and not error.is_transient:
                    raise RewardError(self._trouble) from error
                waited += service.is_restarted and isinstance(error, aiohttp.ClientConnectorError)
            failed[url] += 1
            if failed.total() - waited > service.max_retries and len(failed) == len(service.urls):
                raise RewardError(f"{self._trouble} (after reward.max_retries={service.max_retries} retries)")

    async def _post(self, session: aiohttp.ClientSession, url: str, body: bytes) -> str:
        self._running[url] += 1
        try:
            async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                text = await response.text(errors="replace")
        finally:
            self._running[url] -= 1
        if response.status != 200:
            raise HttpFailure(response.status, reply_message(text)[:_MAX_QUOTE])
        return text

    def _scores(self, url: str, text: str, count: int) -> list[float]:
        try:
            return self._read(json.loads(text), count)
        except ValueError as error:  # a JSONDecodeError is one
            raise RewardError(f"{url}: {error}; the reply begins {text[:_MAX_QUOTE]!r}") from error

    def _too_late(self, count: int) -> str:
        return (
            f"{self._done} of {count} requests to {', '.join(self._service.urls)} were answered within "
            f"reward.request_deadline_s={self._service.deadline_s:g} s" + (f"; {self._trouble}" * bool(self._trouble))
        )


def _in_own_loop(make: Callable[[], Coroutine[Any, Any, list[float]]]) -> list[float]:
    """Run it in a thread, as the caller may stand in a loop that runs; one that a signal may leave behind."""
    outcome: Future[list[float]] = Future()

    def run() -> None:
        try:
            outcome.set_result(asyncio.run(make()))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="rewards", daemon=True).start()
    return outcome.result()


def finite(values: object, count: int) -> list[float]:
    """`values`, a list of `count` finite numbers. Raises ValueError where it is anything else."""
    if not isinstance(values, list):
        raise ValueError(f"a list of {count} rewards was wanted")
    if len(values) != count:
        raise ValueError(f"{len(values)} rewards came back for {count} responses")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"a reward must be a finite number, not {value!r}")
    return [float(value) for value in values]
