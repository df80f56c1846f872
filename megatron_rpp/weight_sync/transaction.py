"""One attempt at a sync: begin(version) -> send -> commit -> verify -> release.

From `begin` to `release` the servers sample nothing, and answer as `unverified` should they be resumed by
someone else. Only weights whose checksums equal the trainer's get a version.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from megatron_rpp import device
from megatron_rpp.config.schema import WeightSyncConfig
from megatron_rpp.model.build import Model
from megatron_rpp.model.export_hf import takes_part_in_export
from megatron_rpp.model.stage_export import StageExport
from megatron_rpp.rollout import control
from megatron_rpp.rollout.fleet import Server
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.weight_sync.phases import Phases, for_each_server
from megatron_rpp.weight_sync.transport import Deadline, ServerFailure, Shipment, Transport, WeightSyncError
from megatron_rpp.weight_sync.verification import Verification

CLEANUP_S = 5.0
"""For closing sessions and resuming servers after a failure, past the deadline if need be."""


@dataclass(frozen=True)
class Transaction:
    """Brings `servers` to `policy`'s weights as `version`. All ranks of the job run it alike."""

    policy: Model
    servers: tuple[Server, ...]
    version: int
    transport: Transport
    phases: Phases
    dtype: torch.dtype | None  # of the servers' weights, as StageExport's
    config: WeightSyncConfig
    released: dict[str, set[str]] = field(default_factory=dict)  # URL -> memory that a server has yet to take again

    def run(self) -> SyncReport:
        """Raises WeightSyncError on every rank; then no server keeps a version that it was not verified to hold."""
        start = time.monotonic()
        verification = Verification(self.policy, self.servers, self.version, self.dtype, self.config)
        self._arrive()
        try:
            self._on_servers("begin", self._begin)
            sent = self._send(verification)
            if self.released:
                self._arrive()
            send_s = time.monotonic() - start
            self._on_servers("commit", self._commit)
            verification.run(self.phases, is_leader=self.policy.parallel.is_stage_leader)
            self._on_servers("release", self._release)
        except WeightSyncError:
            self.transport.settle(verified=False)
            self._clean_up()
            raise
        self.transport.settle(verified=True)
        total_s = time.monotonic() - start
        return SyncReport(self.transport.name, self.version, sent, send_s, total_s, len(self.servers))

    def _arrive(self) -> None:
        """Wait for all ranks, each of which has made room where servers on its GPU are about to take memory again."""
        if self.released:
            device.free_cached_memory()  # of activations before "begin", of the export's buffers before "commit"
        self.phases.run(self.phases.deadline("arrive"))

    def _send(self, verification: Verification) -> int:
        """Bytes that all ranks sent, once for all servers."""
        deadline = self.phases.deadline("send")
        export = StageExport(
            self.policy,
            self.dtype,
            gather=partial(self.phases.gather_shards, deadline),
            watch=verification.add if self.policy.parallel.is_stage_leader else None,
        )
        shipment = Shipment(export, self.servers, self.version, deadline, partial(self.phases.gather, deadline))
        send = lambda _: self.transport.send(shipment)  # noqa: E731
        if not self.transport.streams:
            return sum(sent or 0 for sent in self.phases.run(deadline, send))
        total = 0
        for stage in range(self.policy.parallel.pp_size):
            is_mine = self.policy.parallel.pp_rank == stage and takes_part_in_export(self.policy)
            total += sum(sent or 0 for sent in self.phases.run(deadline, send if is_mine else None))
        return total

    def _on_servers(self, phase: str, action: Callable[[Server, Deadline], None]) -> None:
        """Run `action` for every server at once, on rank 0."""
        each = partial(for_each_server, self.servers, action)
        self.phases.run(self.phases.deadline(phase), each if dist.get_rank() == 0 else None)

    def _begin(self, server: Server, deadline: Deadline) -> None:
        held = control.version(server.url, deadline.left_s())
        if server.is_synced and held not in (None, str(server.version), control.UNVERIFIED):
            raise ServerFailure(server.url, f"it answers as version {held}, and was brought to {server.version}")
        control.pause(server.url, self.config.pause, deadline.left_s())
        control.set_version(server.url, control.UNVERIFIED, deadline.left_s())
        self._resume_memory(server, "weights", deadline)
        if self.transport.streams:
            control.begin_update(server.url, deadline.left_s())

    def _commit(self, server: Server, deadline: Deadline) -> None:
        if self.transport.streams:
            control.end_update(server.url, deadline.left_s())
        self._resume_memory(server, "kv_cache", deadline)
        control.flush_cache(server.url, deadline.left_s())

    def _release(self, server: Server, deadline: Deadline) -> None:
        control.set_version(server.url, str(self.version), deadline.left_s())
        control.resume(server.url, deadline.left_s())

    def _resume_memory(self, server: Server, tag: str, deadline: Deadline) -> None:
        """Once: a server that is asked for memory that it has ends."""
        if tag in self.released.get(server.url, ()):
            self.released[server.url].discard(tag)
            control.resume_memory(server.url, [tag], deadline.left_s())

    def _clean_up(self) -> None:
        """After a failure, on rank 0: no server may stay paused or in a session; what it holds stays unverified."""
        if dist.get_rank() == 0:
            with suppress(ExceptionGroup):
                for_each_server(self.servers, self._abandon, Deadline("clean-up", CLEANUP_S))

    def _abandon(self, server: Server, deadline: Deadline) -> None:
        with suppress(RolloutError):  # none may be open
            control.end_update(server.url, deadline.left_s())
        control.set_version(server.url, control.UNVERIFIED, deadline.left_s())
        for tag in control.MEMORY:
            self._resume_memory(server, tag, deadline)
        control.resume(server.url, deadline.left_s())


@dataclass(frozen=True)
class SyncReport:
    """How a verified sync went."""

    transport: str
    version: int
    sent_bytes: int  # by all ranks, once for all servers
    send_s: float  # until all buckets were loaded, arrival and begin included
    total_s: float
    servers: int

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl."""
        return {"sync/mb": self.sent_bytes / 2**20, "sync/send_s": self.send_s, "sync/servers": float(self.servers)}
