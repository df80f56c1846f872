"""Without whom a sync is tried a last time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.rollout.fleet import Server
from megatron_rpp.rollout.probe import ServerInfo
from megatron_rpp.weight_sync.synced_engine import SyncedRolloutEngine
from megatron_rpp.weight_sync.transport import Failure, WeightSyncError


def server(url: str, version: int = 0) -> Server:
    return Server(url, ServerInfo(1, "cpu"), version)


class Fleet:
    """Whose servers are all healthy, whatever becomes of a sync."""

    has_released_memory = False

    def __init__(self, *servers: Server) -> None:
        self.known = servers
        self.dropped: list[str] = []
        self.lost: list[float] = []  # seconds, of each drop

    def servers(self) -> tuple[Server, ...]:
        return self.known

    def suspect(self, urls: Iterable[str]) -> None: ...

    def mark(self, servers: Sequence[Server], version: int) -> None:
        urls = {s.url for s in servers}
        self.known = tuple(replace(s, version=version) if s.url in urls else s for s in self.known)

    def drop(self, servers: Sequence[Server], reason: str, lost_s: float = 0.0) -> None:
        self.lost.append(lost_s)
        self.dropped += [s.url for s in servers]
        self.known = tuple(s for s in self.known if s.url not in self.dropped)


def engine_of(fleet: Fleet, *errors: str, max_retries: int = 2) -> tuple[SyncedRolloutEngine, list[str]]:
    """An engine whose tries fail with `errors`, the URLs that each names, and then no more; who each try is for."""
    engine: Any = SyncedRolloutEngine.__new__(SyncedRolloutEngine)
    tries: list[str] = []
    by: list[str] = []  # the transport of each

    def transaction(servers: Sequence[Server], version: int, transport: Any, **_: Any) -> Any:
        tries.append("".join(s.url for s in servers))
        by.append(transport.name)

        def run() -> None:
            if len(tries) <= len(errors):
                raise WeightSyncError(
                    "planted", [Failure("verify", 0, "planted", url) for url in errors[len(tries) - 1]]
                )

        return SimpleNamespace(run=run)

    engine._fleet, engine._client = fleet, SimpleNamespace(urls=(), version=None)
    engine._rollout, engine._transports = (
        RolloutConfig(max_retries=max_retries),
        [SimpleNamespace(name=n) for n in ("nccl", "disk")],
    )
    engine._transaction, engine.policy_version, engine._failed_newcomers = transaction, 0, 0
    engine.by = by
    return engine, tries


def test_the_last_try_goes_without_the_one_that_every_error_has_named() -> None:
    fleet = Fleet(server("a"), server("b"), server("c"))
    engine, tries = engine_of(fleet, "ab", "a")
    engine.sync(1)
    assert tries == ["abc", "abc", "bc"] and fleet.dropped == ["a"]
    assert engine._client.urls == ("b", "c")


@pytest.mark.parametrize("errors", [("ab", "ab", "ab"), ("", "", ""), ("a", "b", "a")])
def test_nobody_is_left_out_where_all_are_named_or_none_was_named_every_time(errors: tuple[str, ...]) -> None:
    """A slow trainer, or a network that fails, is no server's fault."""
    fleet = Fleet(server("a"), server("b"))
    engine, tries = engine_of(fleet, *errors)
    with pytest.raises(WeightSyncError, match="policy version 1: planted"):
        engine.sync(1)
    assert tries == ["ab", "ab", "ab"] and fleet.dropped == []


@pytest.mark.parametrize("max_retries", [0, 1])
def test_one_bad_moment_costs_a_good_server_nothing(max_retries: int) -> None:
    """All tries of so few are for all."""
    fleet = Fleet(server("a"), server("b"))
    engine, tries = engine_of(fleet, "a", "a", max_retries=max_retries)
    with pytest.raises(WeightSyncError):
        engine.sync(1)
    assert tries == ["ab"] * (max_retries + 1) and fleet.dropped == []


def newcomers(urls: str, *errors: str) -> tuple[Fleet, Any, list[str]]:
    """One server that serves, and those at `urls`, each a letter; as `engine_of`."""
    fleet = Fleet(server("a", 1), *(server(url, -1) for url in urls))
    engine, tries = engine_of(fleet, *errors)
    engine.policy_version = 1
    return fleet, engine, tries


def test_a_newcomer_that_cannot_be_brought_is_tried_once_and_leaves_the_others_serving() -> None:
    """Each try is a sync that the others wait for."""
    fleet, engine, tries = newcomers("b", "b")
    engine._admit_newcomers()
    assert tries == ["b"] and fleet.dropped == ["b"] and 0.0 < fleet.lost[0] < 60.0
    assert engine._client.urls == ("a",)


def test_a_good_newcomer_is_not_left_out_with_an_unfit_one() -> None:
    fleet, engine, tries = newcomers("bc", "b")
    engine._admit_newcomers()
    assert fleet.dropped == ["b"] and engine._client.urls == ("a",)
    engine._admit_newcomers()
    assert tries == ["bc", "c"] and engine._client.urls == ("a", "c")


def test_the_next_try_of_newcomers_is_by_the_next_transport() -> None:
    """One that a server cannot be reached by would keep it out for ever."""
    fleet, engine, _ = newcomers("bcd", "b", "c")
    for _ in range(3):
        engine._admit_newcomers()
    assert engine.by == ["nccl", "disk", "nccl"] and fleet.dropped == ["b", "c"]
    assert engine._client.urls == ("a", "d") and engine._failed_newcomers == 0


def test_newcomers_that_no_error_names_are_left_out_for_a_while() -> None:
    fleet, engine, _ = newcomers("bc", "")
    engine._admit_newcomers()
    assert fleet.dropped == ["b", "c"] and engine._client.urls == ("a",)


def test_a_newcomer_takes_no_part_in_the_sync_of_those_that_hold_a_version() -> None:
    """It is brought before the next sampling, alone, where its failures are nobody else's."""
    engine, tries = engine_of(Fleet(server("a"), server("b", -1)))
    engine.sync(1)
    assert tries == ["a"] and engine._client.urls == ("a",)
    engine._admit_newcomers()
    assert tries == ["a", "b"] and engine._client.urls == ("a", "b")
