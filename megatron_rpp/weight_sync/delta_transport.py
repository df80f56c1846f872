"""Only what has changed since the last sync goes to the servers; now and then, and to newcomers, everything."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from torch import Tensor

from megatron_rpp.rollout import control
from megatron_rpp.rollout.http import post_json
from megatron_rpp.weight_sync.delta import (
    ENDPOINT,
    STATUS_SKIP,
    DeltaBucket,
    DeltaEncoder,
    failures,
    forget_failures,
    payload,
)
from megatron_rpp.weight_sync.in_flight import InFlight, Poster, stream
from megatron_rpp.weight_sync.transport import ServerFailure, Shipment, Transport


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
        self._encoder, self._poster = DeltaEncoder(), Poster()
        self._base: int | None = None  # the version that the encoder remembers
        self._version = -1  # of the present sync
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
        if verified:
            self._encoder.commit()
            self._base = self._version
        else:
            self._encoder.rollback()
            self._base = None

    def close(self) -> None:
        self._poster.close()
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

        return self._full.send(replace(shipment, export=replace(shipment.export, watch=remember)))

    def _send_changes(self, shipment: Shipment) -> int:
        tensors = shipment.export.tensors()
        if not shipment.policy.parallel.is_stage_leader:
            deque(tensors, maxlen=0)
            return 0
        try:
            changes = self._encoder.encode(tensors, self._bucket_bytes)
            sent = stream(shipment, changes, lambda bucket: self._start(bucket, shipment))
        finally:
            deque(tensors, maxlen=0)  # where the encoder has failed
        self._raise_refusals(shipment)
        return sent

    def _start(self, bucket: DeltaBucket, shipment: Shipment) -> InFlight:
        payloads = {server.url: payload(bucket, server.tp_size) for server in shipment.servers}
        sent = sum(bucket.wire_bytes(server.tp_size) for server in shipment.servers)
        return InFlight(
            ", ".join(bucket.names[:3]), sent, self._poster.post(ENDPOINT, payloads, shipment.deadline.left_s())
        )

    @staticmethod
    def _raise_refusals(shipment: Shipment) -> None:
        """SGLang answers well even where our loader could not load; it leaves a note that has to be asked for.

        The notes are taken away again: they would stand among the server's tensors.
        """
        found = [
            (server, failures(control.checksums(server.url, STATUS_SKIP, shipment.deadline.left_s())))
            for server in shipment.servers
        ]
        for server, notes in found:
            if notes:
                post_json(server.url, ENDPOINT, forget_failures(server.tp_size), shipment.deadline.left_s())
        for server, notes in found:
            if notes:
                raise ServerFailure(server.url, "; ".join(notes))
