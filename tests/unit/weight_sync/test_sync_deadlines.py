"""Who is to blame where a deadline has passed: the servers that owe a reply, or else the trainer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rpp.model.stage_export import StageExport
from megatron_rpp.rollout.fleet import Server
from megatron_rpp.rollout.probe import ServerInfo
from megatron_rpp.weight_sync import disk, in_flight
from megatron_rpp.weight_sync.disk import DiskTransport
from megatron_rpp.weight_sync.in_flight import InFlight
from megatron_rpp.weight_sync.phases import Phases
from megatron_rpp.weight_sync.transport import Deadline, Shipment, WeightSyncError

Reply = Future[dict[str, object]]
HINT = "raise weight_sync.deadline_s"


@dataclass(frozen=True)
class Bucket:
    may_overlap: bool = True


class Work:
    """A broadcast that has ended or never does."""

    def __init__(self, *, done: bool = False) -> None:
        self._done = done

    def is_completed(self) -> bool:
        return self._done

    def wait(self) -> None:
        raise AssertionError("it would hang")


def reply(*, done: bool) -> Reply:
    future: Reply = Future()
    if done:
        future.set_result({})
    return future


def over() -> Deadline:
    return Deadline("send", -1.0)


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> Phases:
    """Of a job with one rank."""
    monkeypatch.setattr(dist, "get_rank", lambda *_: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 1)
    return Phases(dist.HashStore(), deadline_s=0.5)


def test_only_servers_without_a_reply_are_blamed() -> None:
    sent = InFlight("a bucket", 1, {"http://a": reply(done=True), "http://b": reply(done=False)})
    with pytest.raises(ExceptionGroup) as raised:
        sent.wait(over())
    (failure,) = raised.value.exceptions
    assert failure.server == "http://b" and "was not taken" in str(failure) and HINT in str(failure)


def test_where_all_have_replied_no_server_is_blamed() -> None:
    sent = InFlight("a bucket", 1, {"http://a": reply(done=True)}, [Work()])  # type: ignore[list-item]
    with pytest.raises(TimeoutError, match=HINT):
        sent.wait(over())


@pytest.mark.parametrize("sent", [0, 1])
def test_the_next_request_waits_until_this_one_cannot_be_overtaken(sent: int) -> None:
    """It is when a broadcast that belongs to it has ended, where that is a proof, and else when all is loaded."""
    works: Any = [Work(done=number < sent) for number in range(2)]
    for is_proof in (True, False):
        on_its_way = InFlight("a bucket", 1, {"http://a": reply(done=False)}, works, sent_is_taken=is_proof)
        if is_proof and sent:
            on_its_way.wait_taken(over())
        else:
            with pytest.raises(ExceptionGroup, match="servers are silent"):
                on_its_way.wait_taken(over())


@pytest.mark.parametrize(("has_replied", "blamed"), [(True, set()), (False, {"http://a"})])
def test_a_trainer_that_gathers_too_slowly_blames_no_server_that_has_replied(
    phases: Phases, has_replied: bool, blamed: set[str]
) -> None:
    def slow() -> Iterator[Bucket]:
        yield Bucket()
        time.sleep(0.6)
        yield Bucket()

    started = []

    def start(bucket: Bucket) -> InFlight:
        started.append(bucket)
        sent = InFlight("a bucket", 1, {"http://a": reply(done=has_replied)})
        sent.wait_taken = lambda deadline: None  # type: ignore[method-assign] # a broadcast that is under way
        return sent

    with pytest.raises(WeightSyncError, match=HINT) as raised:
        phases.run(phases.deadline("send"), lambda deadline: in_flight._send(slow(), start, deadline))
    assert raised.value.servers == blamed
    assert len(started) == 1, "the servers were asked though the time was up"


@pytest.mark.parametrize("tensors", [0, 3])
def test_a_disk_that_is_too_slow_is_named_and_no_server_blamed(
    phases: Phases, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tensors: int
) -> None:
    """Writing ends at the deadline, so that other ranks of the stage need not wait for it in their gathers."""
    written = []

    def save_hf(*_: Any, export: StageExport, **__: Any) -> int:
        for number in range(tensors):
            assert export.watch is not None
            export.watch(str(number), torch.empty(0))
            written.append(number)
            time.sleep(0.3)
        time.sleep(0.0 if tensors else 0.6)
        return 1

    monkeypatch.setattr(disk, "save_hf", save_hf)
    monkeypatch.setattr(disk, "post_all", lambda *_: pytest.fail("servers were asked though the time was up"))
    seen: list[str] = []
    model: Any = SimpleNamespace(parallel=SimpleNamespace(is_stage_leader=True))
    export = StageExport(model, watch=lambda name, _: seen.append(name))
    transport = DiskTransport(folder=tmp_path / "weights", seen_as="weights", source="")
    deadline = phases.deadline("send")
    shipment = Shipment(export, (Server("http://a", ServerInfo(1, "cpu"), 0),), 1, deadline, lambda value: [value])
    with pytest.raises(WeightSyncError, match=r"writing .*weights took longer than weight_sync.deadline_s=0.5 s") as e:
        phases.run(deadline, lambda _: transport.send(shipment))
    assert e.value.servers == set()
    assert len(written) < 3 and seen == [str(n) for n in written]
