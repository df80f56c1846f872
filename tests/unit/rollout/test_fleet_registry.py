"""The fleet follows the servers that announce themselves; they are small fakes, the store is a real one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from fake_sglang import FakeServer, running

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config
from megatron_rpp.rollout.fleet import ServerFleet
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.rollout.registry import Registry


@pytest.fixture
def fakes() -> Iterator[list[FakeServer]]:
    with running() as first, running() as second:
        yield [first, second]


@pytest.fixture
def registry() -> Registry:
    """Through which servers announce themselves; the fleets have readers of their own on its store."""
    return Registry(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), "7.0", 60.0)


def fleet_of(registry: Registry, **rollout: Any) -> ServerFleet:
    defaults = {"registry": True, "health_deadline_s": 2.0, "startup_deadline_s": 30.0}
    return ServerFleet(Config(rollout=RolloutConfig(**defaults | rollout)), registry)


def versions(fleet: ServerFleet) -> list[tuple[str, int]]:
    return [(server.url, server.version) for server in fleet.refresh()]


def test_servers_join_and_leave_as_they_announce_and_withdraw(fakes: list[FakeServer], registry: Registry) -> None:
    first = registry.announce(fakes[0].url, "a")
    fleet = fleet_of(registry)
    fleet.wait_ready()
    fleet.mark([fakes[0].url], 7)
    registry.announce(fakes[1].url, "b")
    assert versions(fleet) == [(fakes[0].url, 7), (fakes[1].url, -1)]
    first.withdraw()
    assert versions(fleet) == [(fakes[1].url, -1)]


def test_a_server_that_was_started_again_at_its_url_must_be_synced_again(
    fakes: list[FakeServer], registry: Registry
) -> None:
    registry.announce(fakes[0].url, "a")
    fleet = fleet_of(registry)
    fleet.wait_ready()
    fleet.mark([fakes[0].url], 7)
    assert versions(fleet) == [(fakes[0].url, 7)]
    registry.announce(fakes[0].url, "a")  # its first process was killed, and could not withdraw
    assert versions(fleet) == [(fakes[0].url, -1)]


def test_the_start_waits_for_as_many_servers_as_the_run_wants(fakes: list[FakeServer], registry: Registry) -> None:
    registry.announce(fakes[0].url, "a")
    late = threading.Timer(1.0, registry.announce, (fakes[1].url, "b"))
    start = time.monotonic()
    late.start()
    fleet = fleet_of(registry, num_servers=2)
    fleet.wait_ready()
    assert time.monotonic() - start >= 1.0
    assert len(fleet.refresh()) == 2


def test_the_start_goes_on_with_those_that_came_in_time(
    fakes: list[FakeServer], registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    registry.announce(fakes[0].url, "a")
    fleet = fleet_of(registry, num_servers=3, startup_deadline_s=0.5)
    with caplog.at_level(logging.WARNING):
        fleet.wait_ready()
    assert "1 of 3 SGLang servers were healthy after rollout.startup_deadline_s=0.5 s" in caplog.text
    assert versions(fleet) == [(fakes[0].url, -1)]


def test_without_any_server_the_start_fails_and_says_how_to_start_one(registry: Registry) -> None:
    with pytest.raises(RolloutError, match=r"0 of 1 .* no other has announced itself; start it with `rpp serve`"):
        fleet_of(registry, startup_deadline_s=0.3).wait_ready()


def test_in_a_run_the_only_servers_return_is_waited_for(fakes: list[FakeServer], registry: Registry) -> None:
    with running() as dying:
        registry.announce(dying.url, "a")
        fleet = fleet_of(registry)
        fleet.wait_ready()
    assert fleet.refresh() == (), "it is dead, though it could not withdraw"
    threading.Timer(1.0, registry.announce, (fakes[0].url, "a")).start()
    fleet.wait_ready(at_least=1)
    assert versions(fleet) == [(fakes[0].url, -1)]
