"""When the trainer makes room on GPUs that it shares with servers (rollout.release_memory)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from megatron_rpp import device
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import WeightSyncConfig
from megatron_rpp.weight_sync import transaction
from megatron_rpp.weight_sync.synced_engine import SyncedRolloutEngine
from megatron_rpp.weight_sync.transaction import Transaction

ROOM = ["free", "arrive"]


@pytest.mark.parametrize(
    ("released", "expected"),
    [
        ({"http://a": {"weights", "kv_cache"}}, [*ROOM, "begin", "send", *ROOM, "commit", "release"]),
        ({}, ["arrive", "begin", "send", "commit", "release"]),
    ],
)
def test_every_rank_has_made_room_before_servers_take_their_memory_again(
    monkeypatch: pytest.MonkeyPatch, released: dict[str, set[str]], expected: list[str]
) -> None:
    done: list[str] = []
    phases = SimpleNamespace(deadline=lambda phase: phase, run=lambda phase: done.append(phase))
    monkeypatch.setattr(device, "free_cached_memory", lambda: done.append("free"))
    monkeypatch.setattr(transaction, "Verification", MagicMock())
    monkeypatch.setattr(Transaction, "_on_servers", lambda self, phase, action: done.append(phase))
    monkeypatch.setattr(Transaction, "_send", lambda self, verification: done.append("send") or 0)
    stub: Any = MagicMock()
    Transaction(stub, (), 1, stub, phases, None, WeightSyncConfig(), released).run()  # type: ignore[arg-type]
    assert done == expected


@pytest.mark.parametrize(("wanted", "has_released", "times"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_a_server_that_sleeps_is_not_told_to_release_again(wanted: bool, has_released: bool, times: int) -> None:
    """A checkpoint asks for the room, too; SGLang would end on memory that it no longer has."""
    engine = SyncedRolloutEngine.__new__(SyncedRolloutEngine)
    engine._rollout, engine._fleet = RolloutConfig(release_memory=wanted), MagicMock(has_released_memory=has_released)
    engine.release_memory()
    assert engine._fleet.release_memory.call_count == times  # type: ignore[attr-defined]
