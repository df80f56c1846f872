"""weight_sync.verify=sample is for servers that were wholly compared before; others are wholly compared now."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest

from megatron_rpp.config.schema import WeightSyncConfig
from megatron_rpp.experience.types import UNSYNCED
from megatron_rpp.rollout.fleet import Server
from megatron_rpp.rollout.probe import ServerInfo
from megatron_rpp.weight_sync.synced_engine import SyncedRolloutEngine

KNOWN, NEWCOMER = Server("http://a", ServerInfo(1, "cpu"), 3), Server("http://b", ServerInfo(1, "cpu"), UNSYNCED)


@pytest.mark.parametrize(
    ("verify", "servers", "is_first", "wanted"),
    [
        ("sample", [KNOWN], True, "sample"),
        ("sample", [KNOWN, NEWCOMER], True, "full"),
        ("sample", [KNOWN], False, "full"),
        ("full", [KNOWN], True, "full"),
        ("off", [NEWCOMER], False, "off"),
    ],
)
def test_newcomers_and_retries_are_compared_in_full(
    verify: str, servers: list[Server], is_first: bool, wanted: str
) -> None:
    engine = SyncedRolloutEngine.__new__(SyncedRolloutEngine)
    engine._config, engine._dtype = WeightSyncConfig(verify=verify), None
    engine._policy, engine._phases, engine._fleet = MagicMock(), MagicMock(), MagicMock()
    assert engine._transaction(servers, 4, MagicMock(), is_first=is_first).config.verify == wanted
