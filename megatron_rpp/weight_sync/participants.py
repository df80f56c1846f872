"""Which servers the next try of a sync is for."""

from __future__ import annotations

from collections.abc import Sequence, Set

from megatron_rpp.rollout.fleet import Server


def still_wanted(alive: Sequence[Server], servers: Sequence[Server], version: int) -> list[Server]:
    """Who of `servers` is `alive`, or whoever has come anew; none where others serve `version` already."""
    wanted = {server.url for server in servers}
    left = [server for server in alive if server.url in wanted]
    if left or any(server.version == version for server in alive):
        return left
    return list(alive)


def parted(servers: Sequence[Server], blamed: Set[str]) -> tuple[list[Server], list[Server]]:
    """(those that go on, those that are left out): the latter at the URLs `blamed`, none where all would be."""
    left = [server for server in servers if server.url not in blamed]
    return (left, [server for server in servers if server.url in blamed]) if left else (list(servers), [])
