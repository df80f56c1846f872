"""Servers on CPUs and on GPUs hash differently, and are verified beside each other."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rpp.rollout import control
from megatron_rpp.rollout.fleet import Server
from megatron_rpp.rollout.probe import ServerInfo
from megatron_rpp.weight_sync.transport import Deadline, ServerFailure
from megatron_rpp.weight_sync.verification import _check

PLACE = {"tp_rank": 0, "tp_size": 1, "dp_rank": 0, "dp_size": 1, "pp_rank": 0, "pp_size": 1}


@pytest.mark.parametrize(
    ("device", "digest", "is_right"), [("cpu", "c", True), ("cuda", "g", True), ("cuda", "c", False)]
)
def test_every_server_is_compared_with_the_digests_of_its_own_device(
    monkeypatch: pytest.MonkeyPatch, device: str, digest: str, is_right: bool
) -> None:
    reported: list[dict[str, Any]] = [{"checksums": {"a.weight": digest}, "parallelism_info": [PLACE]}]
    monkeypatch.setattr(control, "checksums", lambda *_: reported)
    expected = {"cpu": {1: [{"a.weight": "c"}]}, "cuda": {1: [{"a.weight": "g"}]}}
    server, deadline = Server("http://a", ServerInfo(1, device), 0), Deadline("verify", 10.0)
    if is_right:
        _check(expected, (), server, deadline)
        return
    with pytest.raises(ServerFailure, match=r"a\.weight") as raised:
        _check(expected, (), server, deadline)
    assert raised.value.server == server.url
