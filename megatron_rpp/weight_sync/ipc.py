"""Weights to SGLang servers on the trainer's own GPUs, by CUDA IPC: only handles travel.

A server's rank opens the sender's buffer and copies its part out of it, from another GPU of the node if
need be. Where there are no GPUs (in tests) the same requests carry the bytes.
"""

from __future__ import annotations

import base64
import io
import pickle
import socket
from functools import partial
from multiprocessing.reduction import ForkingPickler
from urllib.parse import urlsplit

from megatron_rpp.weight_sync.export import Bucket, stage_buckets, tensors_of
from megatron_rpp.weight_sync.in_flight import InFlight, post_all, stream
from megatron_rpp.weight_sync.server_group import address_seen_by
from megatron_rpp.weight_sync.transport import ServerFailure, Shipment


class IpcTransport:
    """Streams buckets into `/update_weights_from_tensor`."""

    name = "ipc"
    streams = True

    def __init__(self, *, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes

    def send(self, shipment: Shipment) -> int:
        """See Transport."""
        for server in shipment.servers:
            if not _is_here(server.url):  # it would open our handles in vain, and end
                raise ServerFailure(server.url, "ipc needs servers on the trainer's host; choose broadcast or disk")
        make = partial(stage_buckets, shipment.export, bucket_bytes=self._bucket_bytes, flatten=True)
        return stream(shipment, make, lambda bucket: self._start(bucket, shipment))

    def settle(self, *, verified: bool) -> None:
        """Nothing is held between syncs."""

    def close(self) -> None:
        """Nothing is held between syncs."""

    def _start(self, bucket: Bucket, shipment: Shipment) -> InFlight:
        payloads: dict[str, dict[str, object]] = {
            server.url: {
                # A handle may be opened once, so that each TP rank has its own.
                "serialized_named_tensors": [_serialized(bucket) for _ in range(server.tp_size)],
                "flush_cache": False,
            }
            for server in shipment.servers
        }
        replies = post_all("update_weights_from_tensor", payloads, shipment.deadline.left_s())
        return InFlight(bucket, bucket.nbytes, replies)


def _is_here(url: str) -> bool:
    """Whether the server is on this host: on the way to it, this host has its address."""
    host, port = urlsplit(url).hostname, urlsplit(url).port or 80
    return address_seen_by(url) in {str(found[-1][0]) for found in socket.getaddrinfo(host, port)}


def _serialized(bucket: Bucket) -> str:
    """The bucket's tensors for one server rank, as SGLang reads them."""
    named = tensors_of(bucket)
    if not bucket.parts[0].is_cuda:
        return base64.b64encode(pickle.dumps(named)).decode()
    _name_gpus_by_uuid()
    payload = io.BytesIO()
    ForkingPickler(payload).dump(named)
    return base64.b64encode(payload.getvalue()).decode()


def _name_gpus_by_uuid() -> None:
    """Have handles name a GPU by its UUID, so that trainer and server may number theirs differently.

    SGLang's own patch of torch: its servers understand it. Where SGLang stands on another path than the trainer
    (docs/gpu.md) the number itself goes, which they understand too: then both must see the same GPUs in one order.
    """
    try:
        from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
    except ImportError:
        return
    monkey_patch_torch_reductions()
