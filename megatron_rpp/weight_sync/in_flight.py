"""Requests with weights, on their way to every server at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch.distributed as dist

from megatron_rpp.rollout.http import post_json
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.weight_sync.transport import Deadline, ServerFailure, Shipment

B = TypeVar("B")
_POLL_S = 0.0005
_THREADS = 64


class InFlight:
    """One bucket that is being sent. Holds on to it until then."""

    def __init__(
        self,
        what: object,
        nbytes: int,
        replies: Mapping[str, Future[dict[str, object]]],
        work: dist.Work | None = None,
    ) -> None:
        """what: the bucket, named by `str` in errors. nbytes: that this rank sends, once for all servers.

        replies: by URL. work: of a broadcast that belongs to it.
        """
        self._what, self.nbytes, self._replies, self._work = what, nbytes, replies, work

    def wait(self, deadline: Deadline) -> None:
        """Until all servers have loaded it. Raises ServerFailure as soon as one refuses, or at the deadline."""
        while not self._is_done():
            self._raise_refusals()
            if deadline.is_over():
                silent = [url for url, reply in self._replies.items() if not reply.done()] or list(self._replies)
                message = f"{self._what} was not taken within {deadline.seconds:g} s by {', '.join(silent)}"
                raise ServerFailure(silent[0], message)
            time.sleep(_POLL_S)
        self._raise_refusals()
        if self._work is not None:
            self._work.wait()

    def _is_done(self) -> bool:
        is_sent = self._work is None or self._work.is_completed()
        return is_sent and all(reply.done() for reply in self._replies.values())

    def _raise_refusals(self) -> None:
        for url, reply in self._replies.items():
            error = reply.exception() if reply.done() else None
            if isinstance(error, RolloutError):
                raise ServerFailure(url, f"sending {self._what}: {error}") from error
            if error is not None:
                raise error


class Poster:
    """Posts to many servers at once, from threads that live as long as the transport."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def post(
        self, endpoint: str, payloads: Mapping[str, dict[str, object]], timeout_s: float
    ) -> dict[str, Future[dict[str, object]]]:
        """The replies to come, by URL. payloads: by URL."""
        self._pool = self._pool or ThreadPoolExecutor(_THREADS, thread_name_prefix="weight-sync")
        return {url: self._pool.submit(post_json, url, endpoint, body, timeout_s) for url, body in payloads.items()}

    def close(self) -> None:
        """Forget what is under way."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None


def stream(shipment: Shipment, buckets: Iterator[B], start: Callable[[B], InFlight]) -> int:
    """Make this stage's `buckets`, and on its sender send each while the next one is made.

    Returns the bytes that were sent. The buckets are made to the end in any case: other ranks wait in their gathers.
    """
    in_flight, sent = None, 0
    try:
        if shipment.policy.parallel.is_stage_leader:
            for bucket in buckets:
                if in_flight is not None:
                    in_flight.wait(shipment.deadline)
                in_flight = start(bucket)
                sent += in_flight.nbytes
                del bucket
            if in_flight is not None:
                in_flight.wait(shipment.deadline)
    finally:
        deque(buckets, maxlen=0)
    return sent
