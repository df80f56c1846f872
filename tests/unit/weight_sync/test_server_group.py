"""Joining a group with servers, one of which refuses: nobody waits on for it. The servers are threads."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from threading import Semaphore
from typing import Any

import pytest
import torch.distributed as dist

from megatron_rpp.rollout.fleet import Server
from megatron_rpp.rollout.probe import ServerInfo
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.weight_sync import server_group
from megatron_rpp.weight_sync.server_group import ServerGroup
from megatron_rpp.weight_sync.threads import in_thread
from megatron_rpp.weight_sync.transport import Deadline, ServerFailure

GOOD, BAD = "http://127.0.0.1:1", "http://127.0.0.1:2"
SERVERS = [Server(url, ServerInfo(1, "cpu"), 0) for url in (GOOD, BAD)]
LONG_S = 60.0


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def joins(
    monkeypatch: pytest.MonkeyPatch, join: Callable[[str, int], None], stores: int, on_its_way_s: float = 0.2
) -> tuple[Future[None], Future[Any], list[str]]:
    """(the good server's join, the trainer's own, what the failed ServerGroup.join said of which server).

    stores: the bad server refuses once so many are there: the master, and of whom else has connected.
    """
    running: dict[str, Future[Any]] = {}
    connected, store = Semaphore(0), dist.TCPStore

    def connect(*args: Any, **kwargs: Any) -> dist.TCPStore:
        made = store(*args, **kwargs)
        connected.release()
        return made

    def join_server(url: str, place: tuple[str, int, int, int, str], deadline: Deadline) -> None:
        if url == BAD:
            for _ in range(stores):
                assert connected.acquire(timeout=LONG_S)
            raise RolloutError("it is dead")
        running[url] = in_thread(join, place[0], place[1])
        running[url].result()

    sender = server_group._join_as_sender

    def join_as_sender(*args: Any) -> Any:
        running["own"] = Future()
        try:
            running["own"].set_result(sender(*args))
        except BaseException as error:
            running["own"].set_exception(error)
            raise

    monkeypatch.setattr(server_group, "_join_server", join_server)
    monkeypatch.setattr(server_group, "_join_as_sender", join_as_sender)
    monkeypatch.setattr(server_group, "_ON_ITS_WAY_S", on_its_way_s)
    monkeypatch.setattr(dist, "TCPStore", connect)
    with pytest.raises(ExceptionGroup) as raised:
        ServerGroup.join(SERVERS, 0, Deadline("send", LONG_S))
    told = [str(e) for e in raised.value.exceptions if isinstance(e, ServerFailure) and e.server == BAD]
    while running.keys() != {GOOD, "own"}:
        time.sleep(0.01)
    return running[GOOD], running["own"], told


def wait_in_store(host: str, port: int) -> None:
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=LONG_S))
    store.wait(["the other rank"], timedelta(seconds=LONG_S))


def test_a_refusal_frees_the_other_servers_and_this_rank_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would wait for the missing: SGLang for half an hour, this rank for the rest of the deadline."""
    gc.disable()  # the store must not wait for a collection
    try:
        start = time.monotonic()
        good, own, told = joins(monkeypatch, wait_in_store, stores=3)
        assert told == ["joining the weight-update group: it is dead"]
        assert isinstance(good.exception(timeout=20), dist.DistNetworkError)
        assert isinstance(own.exception(timeout=20), RuntimeError)
        assert time.monotonic() - start < LONG_S / 3
    finally:
        gc.enable()


def test_a_server_that_is_about_to_connect_still_finds_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang would look for half an hour for one that is gone."""

    def come_late(host: str, port: int) -> None:
        time.sleep(0.5)
        wait_in_store(host, port)

    start = time.monotonic()
    good, _, _ = joins(monkeypatch, come_late, stores=2, on_its_way_s=2.0)
    with pytest.raises(dist.DistNetworkError, match=r"(?i)recv|closed|reset"):
        good.result(timeout=20)
    assert time.monotonic() - start >= 2.0
