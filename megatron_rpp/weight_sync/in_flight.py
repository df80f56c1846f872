"""Requests with weights, on their way to every server at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Protocol, TypeVar

import torch.distributed as dist

from megatron_rpp.model.stage_export import NamedTensor
from megatron_rpp.rollout.http import post_json
from megatron_rpp.weight_sync.threads import in_thread
from megatron_rpp.weight_sync.transport import RAISE_DEADLINE, Deadline, ServerFailure, Shipment


class Sendable(Protocol):
    """A bucket of any transport."""

    @property
    def may_overlap(self) -> bool:
        """Whether memory allows to make the next one while this one is sent."""
        ...


B = TypeVar("B", bound=Sendable)
_POLL_S = 0.0005


class InFlight:
    """One bucket that is being sent. Holds on to it until then."""

    def __init__(
        self,
        what: object,
        nbytes: int,
        replies: Mapping[str, Future[dict[str, object]]],
        works: Sequence[dist.Work] = (),
        sent_is_taken: bool = False,
    ) -> None:
        """what: the bucket, named by `str` in errors. nbytes: that this rank sends, once for all servers.

        replies: by URL. works: broadcasts that belong to it. sent_is_taken: once one of them is done, every server
        has taken up its request.
        """
        self._what, self.nbytes, self._replies, self._works = what, nbytes, replies, works
        self._sent_is_taken = sent_is_taken

    def wait_taken(self, deadline: Deadline) -> None:
        """Until the servers' next requests cannot overtake this one. Raises as `wait` does."""
        self._wait_until(self._is_taken if self._sent_is_taken else self._is_done, deadline)

    def wait(self, deadline: Deadline) -> None:
        """Until all servers have loaded it.

        Raises an ExceptionGroup of ServerFailures: of all that refuse, as soon as one does, or at the deadline of
        all that were silent. Where every server has replied by then, TimeoutError.
        """
        self._wait_until(self._is_done, deadline)
        for work in self._works:
            work.wait()

    def _wait_until(self, is_reached: Callable[[], bool], deadline: Deadline) -> None:
        while not is_reached():
            self._raise_refusals()
            if deadline.is_over():
                message = f"{self._what} was not taken within {deadline.seconds:g} s; {RAISE_DEADLINE}"
                silent = [ServerFailure(url, message) for url, reply in self._replies.items() if not reply.done()]
                raise ExceptionGroup("servers are silent", silent) if silent else TimeoutError(message)
            time.sleep(_POLL_S)
        self._raise_refusals()

    def _is_taken(self) -> bool:
        return any(work.is_completed() for work in self._works) or self._is_done()

    def _is_done(self) -> bool:
        is_sent = all(work.is_completed() for work in self._works)
        return is_sent and all(reply.done() for reply in self._replies.values())

    def _raise_refusals(self) -> None:
        errors = {url: reply.exception() for url, reply in self._replies.items() if reply.done()}
        failures = [ServerFailure(url, f"sending {self._what}: {e}") for url, e in errors.items() if e is not None]
        if failures:
            raise ExceptionGroup("servers refuse", failures)


def post_all(
    endpoint: str, payloads: Mapping[str, dict[str, object] | bytes], timeout_s: float
) -> dict[str, Future[dict[str, object]]]:
    """Post to many servers at once: the replies to come, by URL. payloads: by URL."""
    return {url: in_thread(post_json, url, endpoint, body, timeout_s) for url, body in payloads.items()}


def stream(
    shipment: Shipment, make: Callable[[Iterator[NamedTensor]], Iterator[B]], start: Callable[[B], InFlight]
) -> int:
    """On the stage's leader, send each bucket that `make` makes of the tensors while the next one is made.

    The other ranks only gather. So does the leader after an error: they wait for it. Returns the bytes sent.
    """
    tensors = shipment.export.tensors()
    if not shipment.policy.parallel.is_stage_leader:
        deque(tensors, maxlen=0)
        return 0
    try:
        return _send(make(tensors), start, shipment.deadline)
    except BaseException:
        with suppress(Exception):  # the first error tells more; a lost group is noted where it is lost
            deque(tensors, maxlen=0)
        raise


def _send(buckets: Iterator[B], start: Callable[[B], InFlight], deadline: Deadline) -> int:
    """A bucket is made while the last one is sent, and sent while servers load the last one."""
    last, sent = None, 0
    for bucket in buckets:
        if last is not None:
            last.wait_taken(deadline)
        if deadline.is_over():
            _blame_for_delay(last, deadline)
        current, may_overlap = start(bucket), bucket.may_overlap
        sent += current.nbytes
        del bucket
        if last is not None:
            last.wait(deadline)
        last = current
        if not may_overlap:
            last.wait(deadline)
            last = None
    if last is not None:
        last.wait(deadline)
    return sent


def _blame_for_delay(last: InFlight | None, deadline: Deadline) -> None:
    """The deadline has passed before a bucket could be sent: servers that owe a reply are to blame, or the trainer."""
    if last is not None:
        last.wait(deadline)
    raise TimeoutError(f"gathering the weights took longer than {deadline.seconds:g} s; {RAISE_DEADLINE}")
