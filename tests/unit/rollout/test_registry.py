"""Servers announce themselves in a real store: who is seen, in which order, and until when."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_rpp.rollout import registry as registry_module
from megatron_rpp.rollout.registry import Announcement, Entry, Registry

DEADLINE_S = 10.0


@pytest.fixture
def store() -> Iterator[dist.TCPStore]:
    yield dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The reader's clock, in seconds."""
    clock = [100.0]
    monkeypatch.setattr(registry_module.time, "monotonic", lambda: clock[0])
    yield clock


def client(store: dist.TCPStore) -> dist.TCPStore:
    """Another process's connection to `store`."""
    return dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))


def registry(store: dist.Store, attempt: str = "7.0") -> Registry:
    return Registry(store, attempt, DEADLINE_S)


def urls(reader: Registry) -> list[str]:
    return [entry.url for entry in reader.entries()]


def test_who_announces_is_seen_by_the_reader_in_that_order_and_gone_once_it_has_withdrawn(
    store: dist.TCPStore,
) -> None:
    reader = registry(store)
    assert reader.entries() == ()
    b = registry(client(store)).announce("http://10.0.0.2:30000/", "node2")
    a = registry(client(store)).announce("http://10.0.0.1:30000", "node1")
    assert reader.entries() == (Entry(1, "http://10.0.0.2:30000", "node2"), Entry(2, "http://10.0.0.1:30000", "node1"))
    b.withdraw()
    assert urls(reader) == ["http://10.0.0.1:30000"]
    b.renew()  # a beat that was under way
    assert urls(reader) == ["http://10.0.0.1:30000"]
    a.withdraw()
    assert reader.entries() == ()


def test_an_entry_without_a_beat_for_the_deadline_is_left_out_until_it_beats_again(
    store: dist.TCPStore, now: list[float]
) -> None:
    reader = registry(store)
    silent, lively = (registry(store).announce(f"http://h:{port}", "h") for port in (1, 2))
    assert urls(reader) == ["http://h:1", "http://h:2"]
    now[0] += DEADLINE_S - 1
    lively.renew()
    assert urls(reader) == ["http://h:1", "http://h:2"]
    now[0] += 2
    assert urls(reader) == ["http://h:2"]
    silent.renew()  # its network is back
    assert urls(reader) == ["http://h:1", "http://h:2"]


def test_a_reader_that_comes_by_seldom_does_not_take_the_living_for_dead(
    store: dist.TCPStore, now: list[float]
) -> None:
    reader = registry(store)
    server = registry(store).announce("http://h:1", "h")
    assert urls(reader) == ["http://h:1"]
    server.renew()
    now[0] += 100 * DEADLINE_S
    assert urls(reader) == ["http://h:1"]


def test_of_two_processes_at_one_url_the_newer_counts_and_is_another_entry(store: dist.TCPStore) -> None:
    reader = registry(store)
    first, other, second = (registry(store).announce(f"http://h:{port}", "h") for port in (1, 2, 1))
    assert reader.entries() == (Entry(2, "http://h:2", "h"), Entry(3, "http://h:1", "h")), "the first was killed"
    first.withdraw()
    assert [entry.slot for entry in reader.entries()] == [2, 3]
    other.withdraw()
    second.withdraw()
    assert reader.entries() == ()


def test_a_server_that_has_only_its_number_yet_does_not_hold_the_reader_up(store: dist.TCPStore) -> None:
    reader = registry(store)
    dist.PrefixStore("rollout-servers/7.0", store).add("slots", 1)
    registry(store).announce("http://h:2", "h")
    start = time.monotonic()
    assert urls(reader) == ["http://h:2"]
    assert time.monotonic() - start < 2, "it waited for a key"


def test_announcements_for_another_start_of_the_job_are_not_seen(store: dist.TCPStore) -> None:
    registry(store, "7.0").announce("http://h:1", "h")
    assert registry(store, "7.1").entries() == ()


def test_servers_that_come_at_once_all_have_slots_of_their_own(store: dist.TCPStore) -> None:
    announced: list[Announcement] = []
    clients = [registry(client(store)) for _ in range(8)]

    def announce(number: int) -> None:
        announced.append(clients[number].announce(f"http://h:{number + 1}", "h"))

    threads = [threading.Thread(target=announce, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = registry(store).entries()
    assert {entry.url for entry in entries} == {f"http://h:{number}" for number in range(1, 9)}
    assert [entry.slot for entry in entries] == list(range(1, 9))


def test_a_store_that_is_gone_is_an_error_at_the_next_beat() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    announcement = registry(client(store)).announce("http://h:1", "h")
    del store
    with pytest.raises(dist.DistError):
        for _ in range(3):
            announcement.renew()
