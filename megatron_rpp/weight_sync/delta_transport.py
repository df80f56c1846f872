"""Only what has changed since the last sync goes to the servers; now and then, and to newcomers, everything."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from megatron_rpp.experience.types import UNSYNCED
from megatron_rpp.rollout import control
from megatron_rpp.rollout.fleet import Server
from megatron_rpp.rollout.http import json_body, post_json
from megatron_rpp.rollout.in_server.delta_loader import LOADER
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.weight_sync.delta import (
    ENDPOINT,
    STATUS_SKIP,
    DeltaBucket,
    DeltaEncoder,
    failures,
    forget_failures,
    payload,
)
from megatron_rpp.weight_sync.in_flight import InFlight, post_all, stream
from megatron_rpp.weight_sync.phases import for_each_server
from megatron_rpp.weight_sync.transport import Deadline, ServerFailure, Shipment, Transport


class DeltaTransport:
    """Streams changes into a loader of ours inside the servers (rollout/in_server).

    Each stage's leader keeps a copy of its tensors in host memory, in the servers' dtype.
    """

    name = "delta"
    streams = True

    def __init__(self, full: Transport, *, bucket_bytes: int, full_every: int) -> None:
        """full: sends everything where there is nothing to build on, and at every `full_every`-th sync."""
        assert full.streams, "one update session serves both"
        self._full, self._bucket_bytes, self._full_every = full, bucket_bytes, full_every
        self._encoder = DeltaEncoder()
        self._base: int | None = None  # the version that the encoder remembers, verified
        self._version = UNSYNCED  # of the present sync
        self._since_full = 0

    def send(self, shipment: Shipment) -> int:
        """See Transport."""
        self._version = shipment.version
        if self._must_be_full(shipment):
            self._since_full = 0
            return self._send_all(shipment)
        self._since_full += 1
        return self._send_changes(shipment)

    def settle(self, *, verified: bool) -> None:
        """What was sent is what the next sync builds on, or there is nothing to build on."""
        self._full.settle(verified=verified)
        self._base = self._version if verified else None
        if not verified:
            self._encoder.forget()

    def close(self) -> None:
        self._full.close()

    def _must_be_full(self, shipment: Shipment) -> bool:
        """All ranks come to the same answer."""
        is_due = self._since_full + 1 >= self._full_every
        return is_due or self._base is None or any(server.version != self._base for server in shipment.servers)

    def _send_all(self, shipment: Shipment) -> int:
        if not shipment.policy.parallel.is_stage_leader:
            return self._full.send(shipment)
        watch = shipment.export.watch

        def remember(name: str, tensor: Tensor) -> None:
            if watch is not None:
                watch(name, tensor)
            self._encoder.remember(name, tensor)

        sent = self._full.send(replace(shipment, export=replace(shipment.export, watch=remember)))
        for_each_server(shipment.servers, check_loader, shipment.deadline)  # before the first delta, which would end it
        return sent

    def _send_changes(self, shipment: Shipment) -> int:
        make = partial(self._encoder.encode, max_bytes=self._bucket_bytes)
        sent = stream(shipment, make, lambda bucket: self._start(bucket, shipment))
        if shipment.policy.parallel.is_stage_leader:
            for_each_server(shipment.servers, check_loaded, shipment.deadline)
        return sent

    def _start(self, bucket: DeltaBucket, shipment: Shipment) -> InFlight:
        # Written once for all servers of a size, and sent to each.
        bodies = {size: json_body(payload(bucket, size)) for size in {server.tp_size for server in shipment.servers}}
        replies = post_all(
            ENDPOINT, {server.url: bodies[server.tp_size] for server in shipment.servers}, shipment.deadline.left_s()
        )
        return InFlight(", ".join(bucket.names[:3]), bucket.wire_bytes, replies)


def check_loader(server: Server, deadline: Deadline) -> None:
    """Raises ServerFailure where `server` was started without our loader."""
    loaders = control.weight_loaders(server.url, deadline.left_s())
    if LOADER not in loaders:
        raise ServerFailure(
            server.url, f"weight_sync.transports=delta needs it started with --custom-weight-loader {LOADER}"
        )


def check_loaded(server: Server, deadline: Deadline) -> None:
    """Raises ServerFailure with what `server` could not load since the first bucket, RolloutError where it is mute.

    SGLang answers well even where our loader could not load; it leaves notes that have to be asked for. They are
    taken away again: they would stand among the server's tensors.
    """
    notes = failures(control.checksums(server.url, STATUS_SKIP, deadline.left_s()))
    if not notes:
        return
    try:
        post_json(server.url, ENDPOINT, forget_failures(server.tp_size), deadline.left_s())
    except RolloutError as error:
        notes.append(f"the note of it could not be taken away: {error}")
    raise ServerFailure(server.url, "; ".join(notes))
