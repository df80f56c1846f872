"""The trainer's digests: made when the servers make theirs, and compared with those of their kind of device."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rpp.config.schema import WeightSyncConfig
from megatron_rpp.rollout import control
from megatron_rpp.rollout.fleet import Server
from megatron_rpp.rollout.probe import ServerInfo
from megatron_rpp.weight_sync import verification
from megatron_rpp.weight_sync.phases import Phases
from megatron_rpp.weight_sync.transport import Deadline, ServerFailure
from megatron_rpp.weight_sync.verification import Verification, _check

PLACE = {"tp_rank": 0, "tp_size": 1, "dp_rank": 0, "dp_size": 1, "pp_rank": 0, "pp_size": 1}


@pytest.mark.parametrize(
    ("device", "digest", "is_right"), [("cpu", "c", True), ("cuda", "g", True), ("cuda", "c", False)]
)
def test_every_server_is_compared_with_the_digests_of_its_own_device(device: str, digest: str, is_right: bool) -> None:
    reply: Future[list[dict[str, Any]]] = Future()
    reply.set_result([{"checksums": {"a.weight": digest}, "parallelism_info": [PLACE]}])
    replies = {"http://a": reply}
    expected = {"cpu": {1: [{"a.weight": "c"}]}, "cuda": {1: [{"a.weight": "g"}]}}
    server, deadline = Server("http://a", ServerInfo(1, device), 0), Deadline("verify", 10.0)
    if is_right:
        _check(expected, (), replies, server, deadline)
        return
    with pytest.raises(ServerFailure, match=r"a\.weight") as raised:
        _check(expected, (), replies, server, deadline)
    assert raised.value.server == server.url


class Chunk(torch.nn.Module):
    share_embeddings_and_output_weights = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 2))


class Checksums:
    """In the place of ExpectedChecksums: what it was given, and when."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.events.append(name)

    def result(self) -> dict[int, list[dict[str, str]]]:
        return {1: [{"a.weight": "c"}]}


def test_what_the_model_holds_is_hashed_while_the_servers_hash_and_what_was_made_to_be_sent_as_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []

    def asked(*_: object) -> list[dict[str, Any]]:
        events.append("servers are asked")
        return [{"checksums": {"a.weight": "c"}, "parallelism_info": [PLACE]}]

    monkeypatch.setattr(verification, "_expected", lambda *_: {"cpu": Checksums(events)})
    monkeypatch.setattr(control, "checksums", asked)
    monkeypatch.setattr(dist, "get_rank", lambda *_: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 1)
    chunk = Chunk()
    policy: Any = SimpleNamespace(hf=SimpleNamespace(num_layers=1), chunks=[chunk])
    found = Verification(policy, [Server("http://a", ServerInfo(1, "cpu"), 0)], 0, None, WeightSyncConfig())
    found.add("a row", chunk.weight.detach()[1])
    found.add("a copy", chunk.weight.detach()[:, 1].contiguous())
    assert events == ["a copy"], "the copy's memory is used again"
    found.run(Phases(dist.HashStore(), deadline_s=5.0), is_leader=True)
    assert sorted(events[1:]) == ["a row", "servers are asked"]
