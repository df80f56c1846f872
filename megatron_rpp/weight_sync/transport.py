"""What a transport does: carry the policy's weights into every server, within a deadline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_rpp.model.build import Model
from megatron_rpp.model.stage_export import StageExport
from megatron_rpp.parallel.collectives import Gather
from megatron_rpp.rollout.fleet import Server

RAISE_DEADLINE = "if it only needs longer, raise weight_sync.deadline_s"


@dataclass(frozen=True)
class Failure:
    """One thing that went wrong in a sync."""

    phase: str  # arrive | begin | send | commit | verify | release
    rank: int  # that noticed it
    message: str
    server: str = ""  # the URL, where one is to blame or may be
    tensors: tuple[str, ...] = ()  # of the server, that are not the trainer's

    def __str__(self) -> str:
        where = f", server {self.server}" if self.server else ""
        return f"phase {self.phase}, rank {self.rank}{where}: {self.message}"


class WeightSyncError(RuntimeError):
    """A sync failed. The servers may hold mixed weights, and answer as `unverified`."""

    def __init__(self, message: str, failures: Sequence[Failure] = ()) -> None:
        super().__init__(message)
        self.failures = tuple(failures)

    @property
    def servers(self) -> set[str]:
        """The URLs that may be to blame."""
        return {failure.server for failure in self.failures if failure.server}


class OutOfStepError(WeightSyncError):
    """Ranks did not come in time, so that no further sync can be tried: the job must end."""


class ServerFailure(Exception):
    """What one server did wrong in a transport's hands."""

    def __init__(self, server: str, message: str, tensors: Sequence[str] = ()) -> None:
        """tensors: the server's, that are not the trainer's."""
        super().__init__(message)
        self.server, self.tensors = server, tuple(tensors)


class Deadline:
    """The end of a phase."""

    def __init__(self, phase: str, seconds: float) -> None:
        self.phase, self.seconds = phase, seconds
        self._end = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds until then, never below 0.1 so that they can be a timeout."""
        return max(self._end - time.monotonic(), 0.1)

    def is_over(self) -> bool:
        return time.monotonic() >= self._end


@dataclass(frozen=True)
class Shipment:
    """One attempt at a sync, as a transport sees it."""

    export: StageExport
    servers: tuple[Server, ...]
    version: int
    deadline: Deadline  # of the send phase
    gather: Gather  # between all ranks, within the deadline

    @property
    def policy(self) -> Model:
        return self.export.model

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]


class Transport(Protocol):
    """`send` runs on the ranks that the transaction names; what it raises is told to all."""

    name: str
    streams: bool
    """Whether buckets go into an update session of the servers, stage by stage: a server takes one at a time.
    Otherwise `send` is called once on every rank of the job."""

    def send(self, shipment: Shipment) -> int:
        """Carry this stage's tensors into the servers; the bytes that this rank has sent.

        A collective as `shipment.export.tensors` is: after an error of its own a rank runs it to its end.
        Raises ServerFailure, RolloutError, OSError, ValueError or RuntimeError.
        """

    def settle(self, *, verified: bool) -> None:
        """The servers are known to hold what was sent, or they are not: then nothing of it may be built on."""

    def close(self) -> None:
        """Let go of groups and servers; the next `send` starts afresh."""
