"""Without whom a sync is tried a last time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.rollout.fleet import Server
from megatron_rpp.weight_sync.synced_engine import SyncedRolloutEngine
from megatron_rpp.weight_sync.transport import Failure, WeightSyncError


def server(url: str, version: int = 0) -> Server:
    return Server(url, 1, "cpu", version)


class Fleet:
    """Whose servers are all healthy, whatever becomes of a sync."""

    has_released_memory = False

    def __init__(self, *servers: Server) -> None:
        self.known = servers
        self.dropped: list[str] = []

    def servers(self) -> tuple[Server, ...]:
        return self.known

    def suspect(self, urls: Iterable[str]) -> None: ...

    def mark(self, servers: Sequence[Server], version: int) -> None:
        urls = {s.url for s in servers}
        self.known = tuple(replace(s, version=version) if s.url in urls else s for s in self.known)

    def drop(self, servers: Sequence[Server], reason: str) -> None:
        self.dropped += [s.url for s in servers]
        self.known = tuple(s for s in self.known if s.url not in self.dropped)


def engine_of(fleet: Fleet, *errors: str, max_retries: int = 2) -> tuple[SyncedRolloutEngine, list[str]]:
    """An engine whose tries fail with `errors`, the URLs that each names, and then no more; who each try is for."""
    engine: Any = SyncedRolloutEngine.__new__(SyncedRolloutEngine)
    tries: list[str] = []

    def transaction(servers: Sequence[Server], *_: Any, **__: Any) -> Any:
        tries.append("".join(s.url for s in servers))

        def run() -> None:
            if len(tries) <= len(errors):
                raise WeightSyncError(
                    "planted", [Failure("verify", 0, "planted", url) for url in errors[len(tries) - 1]]
                )

        return SimpleNamespace(run=run)

    engine._fleet, engine._client = fleet, SimpleNamespace(urls=(), version=None)
    engine._rollout, engine._transports = RolloutConfig(max_retries=max_retries), [SimpleNamespace(name="disk")]
    engine._transaction, engine.policy_version = transaction, 0
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


def test_the_one_try_of_a_run_without_retries_is_for_all() -> None:
    fleet = Fleet(server("a"), server("b"))
    engine, tries = engine_of(fleet, "a", max_retries=0)
    with pytest.raises(WeightSyncError):
        engine.sync(1)
    assert tries == ["ab"] and fleet.dropped == []


def test_a_newcomer_that_cannot_be_brought_leaves_the_others_serving() -> None:
    fleet = Fleet(server("a", 1), server("b", -1))
    engine, tries = engine_of(fleet, "b", "b", "b")
    engine.policy_version = 1
    engine._admit_newcomers()
    assert tries == ["b", "b"] and fleet.dropped == ["b"]
    assert engine._client.urls == ("a",)


def test_a_newcomer_takes_no_part_in_the_sync_of_those_that_hold_a_version() -> None:
    """It is brought before the next sampling, alone, where its failures are nobody else's."""
    engine, tries = engine_of(Fleet(server("a"), server("b", -1)))
    engine.sync(1)
    assert tries == ["a"] and engine._client.urls == ("a",)
    engine._admit_newcomers()
    assert tries == ["a", "b"] and engine._client.urls == ("a", "b")
