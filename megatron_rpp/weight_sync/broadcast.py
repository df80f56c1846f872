"""Weights to SGLang by broadcast: one process group a pipeline stage, with every server in it.

On each stage the first TP rank of the first replica is rank 0 of the group; the servers' TP ranks
follow. Stages send in turn: a server takes one update at a time.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rpp import device
from megatron_rpp.model.build import Model
from megatron_rpp.model.export_hf import hf_tensors, takes_part_in_export
from megatron_rpp.parallel.collectives import gather_errors, on_rank_0
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.weight_sync.export import Bucket, buckets
from megatron_rpp.weight_sync.transport import Post, WeightSyncError

CLEANUP_S = 10.0
"""At least so long for closing the update session after a failure, past the deadline if need be."""


class BroadcastTransport:
    """Streams buckets into `/update_weights_from_distributed` (gloo on CPU, NCCL on GPU)."""

    def __init__(self, post: Post, *, server_tp: int, bucket_bytes: int, deadline_s: float) -> None:
        self._post, self._server_tp = post, server_tp
        self._bucket_bytes, self._deadline_s = bucket_bytes, deadline_s
        self._group: ProcessGroup | None = None
        self._group_name = ""
        self._urls: tuple[str, ...] = ()
        self._end = 0.0  # of the sync under way, by time.monotonic()
        self._generation = 0  # a torn-down group's name is never used again

    def send(self, policy: Model, urls: Sequence[str]) -> None:
        """Send every tensor of `policy` to every server. Raises WeightSyncError on every rank if any rank failed."""
        self._end = time.monotonic() + self._deadline_s
        try:
            self._session(urls, "begin_weight_update")
            for stage in range(policy.parallel.pp_size):
                error = self._send_stage(policy, urls) if self._is_my_turn(policy, stage) else None
                _raise_any(error)
            self._session(urls, "end_weight_update")
        except WeightSyncError:
            self.close()
            self._end = max(self._end, time.monotonic() + CLEANUP_S)
            with suppress(WeightSyncError):  # a server that keeps its session open would refuse the next begin
                self._session(urls, "end_weight_update")
            raise

    def close(self) -> None:
        """Forget the group; the servers' side ends with it. The next `send` makes a new one."""
        if self._group is not None:
            with suppress(Exception):  # the other side may be gone already
                dist.destroy_process_group(self._group)
        self._group, self._urls = None, ()

    @staticmethod
    def _is_my_turn(policy: Model, stage: int) -> bool:
        return policy.parallel.pp_rank == stage and takes_part_in_export(policy)

    def _left_s(self) -> float:
        """Seconds until this sync must have ended."""
        return max(self._end - time.monotonic(), 0.1)

    def _session(self, urls: Sequence[str], endpoint: str) -> None:
        """Rank 0 opens or closes the update session that SGLang wants since 0.5.21; older servers answer 404."""
        on_rank_0(lambda: self._post_session(urls, endpoint), expect=RolloutError, raises=WeightSyncError)

    def _post_session(self, urls: Sequence[str], endpoint: str) -> None:
        refused = None
        for url in urls:  # all of them, so that one that refuses does not leave another's session open
            try:
                self._post(url, endpoint, {}, self._left_s())
            except RolloutError as caught:
                if "HTTP 404" not in str(caught):
                    refused = caught
        if refused is not None:
            raise refused

    def _send_stage(self, policy: Model, urls: Sequence[str]) -> str | None:
        """This stage's buckets. After an error the gathers still run to their end, so that no rank waits."""
        is_sender, error = policy.parallel.tp_rank == 0 and policy.parallel.dp_rank == 0, None
        if is_sender:
            try:
                self._connect(policy, urls)
            except (RolloutError, RuntimeError) as caught:
                error = f"joining the weight-update group: {caught}"
        for bucket in buckets(hf_tensors(policy), self._bucket_bytes):
            if is_sender and error is None:
                try:
                    self._send_bucket(bucket, urls)
                except (RolloutError, RuntimeError) as caught:
                    error = f"sending {bucket.names[0]} .. {bucket.names[-1]}: {caught}"
        return error

    def _connect(self, policy: Model, urls: Sequence[str]) -> None:
        if self._group is not None and self._urls == tuple(urls):
            return
        self.close()
        self._generation += 1
        self._group_name = f"rpp-stage{policy.parallel.pp_rank}-{self._generation}-{time.time_ns()}"
        world_size = 1 + len(urls) * self._server_tp
        host = _address_seen_by(urls[0])
        timeout = timedelta(seconds=self._left_s())
        store = dist.TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False, timeout=timeout)
        pool = ThreadPoolExecutor(len(urls) + 1)
        joins = [
            pool.submit(self._join_server, url, host, store.port, 1 + i * self._server_tp, world_size)
            for i, url in enumerate(urls)
        ]
        group = pool.submit(_join_as_sender, store, world_size, self._group_name, timeout)
        pool.shutdown(wait=False)  # if a server refuses, the sender's join is left to its own timeout
        for join in joins:
            join.result()
        self._group, self._urls = group.result(), tuple(urls)

    def _join_server(self, url: str, host: str, port: int, rank_offset: int, world_size: int) -> None:
        payload: dict[str, object] = {
            "master_address": host,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": self._group_name,
            "backend": device.backend(),
        }
        self._post(url, "init_weights_update_group", payload, self._left_s())

    def _send_bucket(self, bucket: Bucket, urls: Sequence[str]) -> None:
        payload: dict[str, object] = {
            "names": bucket.names,
            "dtypes": bucket.dtypes,
            "shapes": bucket.shapes,
            "group_name": self._group_name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        with ThreadPoolExecutor(len(urls)) as pool:
            replies = [
                pool.submit(self._post, url, "update_weights_from_distributed", payload, self._left_s()) for url in urls
            ]
            work = dist.broadcast(bucket.flat, src=0, group=self._group, async_op=True)
            _wait(work, replies)
            for reply in replies:
                reply.result()


def _raise_any(error: str | None) -> None:
    """Raise on every rank what went wrong on any."""
    if failed := gather_errors(error):
        raise WeightSyncError(failed)


def _wait(work: dist.Work, replies: Sequence[Future[dict[str, object]]]) -> None:
    """Wait for a broadcast, but not past the moment when a server refuses its part of it."""
    while not work.is_completed():
        for reply in replies:
            if reply.done() and reply.exception() is not None:
                raise reply.exception()  # type: ignore[misc]
        time.sleep(0.0005)
    work.wait()


def _join_as_sender(store: dist.Store, world_size: int, name: str, timeout: timedelta) -> ProcessGroup:
    # SGLang's init_custom_process_group makes its side with this private torch function; only the same
    # one gives the same key prefixes in the store. It is the way to a group outside the trainer's world.
    from torch.distributed.distributed_c10d import _new_process_group_helper, _world

    group, _ = _new_process_group_helper(
        world_size,
        0,
        [],
        dist.Backend(device.backend()),
        dist.PrefixStore(name, store),
        group_name=name,  # type: ignore[arg-type]
        timeout=timeout,
    )
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


def _address_seen_by(url: str) -> str:
    """The address of this host on the route to the server at `url`."""
    host, _, port = url.split("://", 1)[-1].rstrip("/").partition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connects nothing, only picks a route
        probe.connect((host, int(port or 80)))
        address: str = probe.getsockname()[0]
        return address
