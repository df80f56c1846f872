"""A torch process group of one trainer rank and the TP ranks of every server, outside the trainer's world."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rpp import device
from megatron_rpp.parallel.interfaces import address_towards, choose_interfaces
from megatron_rpp.rollout.fleet import Server
from megatron_rpp.rollout.http import post_json
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.weight_sync.threads import in_thread
from megatron_rpp.weight_sync.transport import RAISE_DEADLINE, Deadline, ServerFailure

_LEAVE_S = 5.0
_ON_ITS_WAY_S = 3.0
"""How long a request to join may take to reach a server's ranks: without a store they would look for it for long."""


@dataclass(frozen=True)
class ServerGroup:
    """This rank is its rank 0."""

    urls: tuple[str, ...]
    name: str
    group: ProcessGroup
    store: dist.Store  # its other ranks' way to each other, as long as this object lives

    @classmethod
    def join(cls, servers: Sequence[Server], stage: int, deadline: Deadline) -> ServerGroup:
        """Make the group with every server. Raises ServerFailures, one or a group, where they do not join in time.

        Then the others, which would wait for the missing for half an hour, are freed at once by the store's end.
        """
        name = f"rpp-stage{stage}-{time.time_ns()}"  # a torn-down group's name is never used again
        world_size = 1 + sum(server.tp_size for server in servers)
        timeout_s, hosts = deadline.left_s(), [address_seen_by(server.url) for server in servers]
        for host in set(hosts):
            choose_interfaces(host)  # for a trainer on one host, which needed none
        store = dist.TCPStore(
            hosts[0], 0, world_size, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        offsets = accumulate((server.tp_size for server in servers), initial=1)
        joins = {
            server.url: in_thread(_join_server, server.url, (host, store.port, offset, world_size, name), deadline)
            for server, host, offset in zip(servers, hosts, offsets, strict=False)
        }
        # This rank's own join has a connection of its own, so that the store's end frees it, too.
        own = in_thread(_join_as_sender, (hosts[0], store.port), world_size, name, timeout_s)
        try:
            _raise_refusal(joins, deadline)
            return cls(tuple(server.url for server in servers), name, own.result(), store)
        except BaseException:
            in_thread(_end_joins, store)
            del store  # from this frame, which the error holds on to
            raise

    def is_of(self, servers: Sequence[Server]) -> bool:
        """Whether it joins just these, and none that has been started again since."""
        return self.urls == tuple(server.url for server in servers) and all(server.is_synced for server in servers)

    def broadcast(self, flat: Tensor, timeout_s: float) -> dist.Work:
        """Start to send `flat` from this rank."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = _group_timeout(timeout_s)
        return self.group.broadcast([flat], options)

    def close(self) -> None:
        """Leave, and have the servers leave. Returns at once, whatever is under way."""
        in_thread(_leave, self)


def _leave(group: ServerGroup) -> None:
    with suppress(Exception):  # the other side may be gone already
        group.group.abort()
        dist.destroy_process_group(group.group)
    for url in group.urls:
        with suppress(RolloutError):
            post_json(url, "destroy_weights_update_group", {"group_name": group.name}, _LEAVE_S)


def _join_server(url: str, place: tuple[str, int, int, int, str], deadline: Deadline) -> None:
    host, port, rank_offset, world_size, name = place
    payload: dict[str, object] = {
        "master_address": host,
        "master_port": port,
        "rank_offset": rank_offset,
        "world_size": world_size,
        "group_name": name,
        "backend": device.backend(),
    }
    post_json(url, "init_weights_update_group", payload, deadline.left_s())


def _raise_refusal(joins: dict[str, Future[None]], deadline: Deadline) -> None:
    """Wait until all have joined; an error of one ends the wait. Raises an ExceptionGroup of ServerFailures."""
    wait(joins.values(), deadline.left_s(), "FIRST_EXCEPTION")
    late = f"did not join the weight-update group within {deadline.seconds:g} s; {RAISE_DEADLINE}"
    errors = {url: join.exception() if join.done() else None for url, join in joins.items()}
    failures = [
        ServerFailure(url, f"joining the weight-update group: {e}") for url, e in errors.items() if e is not None
    ]
    failures = failures or [ServerFailure(url, late) for url, join in joins.items() if not join.done()]
    if failures:
        raise ExceptionGroup("servers did not join", failures)


def _end_joins(store: dist.Store) -> None:
    """Keep the store for those who are about to connect; whoever then waits in it sees it end with the last hold."""
    time.sleep(_ON_ITS_WAY_S)


def _join_as_sender(place: tuple[str, int], world_size: int, name: str, timeout_s: float) -> ProcessGroup:
    # SGLang's init_custom_process_group makes its side with this private torch function; only the same
    # one gives the same key prefixes in the store. It is the way to a group outside the trainer's world.
    from torch.distributed.distributed_c10d import _new_process_group_helper, _world

    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(*place, world_size, is_master=False, wait_for_workers=False, timeout=timeout)
    group, _ = _new_process_group_helper(
        world_size,
        0,
        [],
        dist.Backend(device.backend()),
        dist.PrefixStore(name, store),
        group_name=name,  # type: ignore[arg-type]
        timeout=_group_timeout(timeout_s),
    )
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


def _group_timeout(timeout_s: float) -> timedelta:
    """NCCL's watchdog ends the whole process at a timeout; there the deadline's own check aborts the group."""
    return timedelta(seconds=timeout_s) if device.backend() == "gloo" else timedelta(days=1)


def address_seen_by(url: str) -> str:
    """The address of this host on the route to the server at `url`. Raises ServerFailure where there is none."""
    place = urlsplit(url)
    try:
        return address_towards(place.hostname or "", place.port or 80)
    except (OSError, ValueError) as error:
        raise ServerFailure(url, f"no route to it: {error}") from error
