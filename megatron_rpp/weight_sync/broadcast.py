"""Weights to SGLang by broadcast: one process group a pipeline stage, with every server in it.

On each stage the first TP rank of the first replica is rank 0 of the group; the servers' TP ranks
follow. The next bucket is gathered while the last one is on its way.
"""

from __future__ import annotations

from functools import cache, partial

from megatron_rpp import device
from megatron_rpp.weight_sync.export import Bucket, stage_buckets
from megatron_rpp.weight_sync.in_flight import InFlight, post_all, stream
from megatron_rpp.weight_sync.server_group import ServerGroup
from megatron_rpp.weight_sync.transport import Shipment


class BroadcastTransport:
    """Streams buckets into `/update_weights_from_distributed` (gloo on CPU, NCCL on GPU)."""

    name = "broadcast"
    streams = True

    def __init__(self, *, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes
        self._group: ServerGroup | None = None

    def send(self, shipment: Shipment) -> int:
        """See Transport. The group stays for the next sync, as long as the servers are the same."""
        # Over gloo, which knows no float8, the copy into one buffer costs as much as the sending. Over NCCL a launch
        # for each tensor would cost more.
        flatten = device.backend() == "nccl" or shipment.export.is_fp8
        make = partial(stage_buckets, shipment.export, bucket_bytes=self._bucket_bytes, flatten=flatten)
        group = cache(lambda: self._joined(shipment))  # on the sender alone, and where its errors are seen to
        return stream(shipment, make, lambda bucket: self._start(group(), bucket, shipment))

    def settle(self, *, verified: bool) -> None:
        """Keep the group where all went well."""
        if not verified:
            self.close()

    def close(self) -> None:
        """Leave the group. Servers that still wait in it see their connection end."""
        if self._group is not None:
            self._group.close()
        self._group = None

    def _joined(self, shipment: Shipment) -> ServerGroup:
        if self._group is None or not self._group.is_of(shipment.servers):
            self.close()
            self._group = ServerGroup.join(shipment.servers, shipment.policy.parallel.pp_rank, shipment.deadline)
        return self._group

    def _start(self, group: ServerGroup, bucket: Bucket, shipment: Shipment) -> InFlight:
        timeout_s = shipment.deadline.left_s()
        payload: dict[str, object] = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": group.name,
            "load_format": "flattened_bucket" if bucket.is_flat else None,
            "flush_cache": False,
        }
        replies = post_all("update_weights_from_distributed", dict.fromkeys(shipment.urls, payload), timeout_s)
        works = [group.broadcast(part, timeout_s) for part in bucket.parts]
        return InFlight(bucket, bucket.nbytes, replies, works, _proves_taken(group))


def _proves_taken(group: ServerGroup) -> bool:
    """Whether every server must have taken up a bucket's request once this rank has sent one of its tensors.

    Then the next request cannot overtake it. Gloo sends nothing to who has not asked for it yet, and from rank 0 to
    the first two others itself.
    """
    return device.backend() == "gloo" and group.group.size() <= 3
