"""Servers that no sync could verify are refused by name, before weights are sent to them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.schema import Config, WeightSyncConfig
from megatron_rpp.rollout.fleet import Server
from megatron_rpp.weight_sync import build
from megatron_rpp.weight_sync.server_checks import check_servers
from megatron_rpp.weight_sync.transport import WeightSyncError
from megatron_rpp.weight_sync.verification import Verification

GOOD = Server("http://good:1", 8, "cpu", 0)
HF: Any = SimpleNamespace(num_layers=2)  # of the model nothing else is asked before a refusal


def test_experts_that_a_server_divides_are_named_with_what_to_change() -> None:
    server = replace(GOOD, url="http://experts:1", ep_size=8)
    with pytest.raises(ConfigError, match=r"http://experts:1 .*ep_size=8.*without --ep-size.*weight_sync\.verify=off"):
        check_servers([GOOD, server], None)
    with pytest.raises(WeightSyncError, match=r"server http://experts:1: runs with expert parallelism") as refused:
        Verification(HF, [GOOD, server], 0, WeightSyncConfig())
    assert refused.value.servers == {server.url}, "of a newcomer, too, and the others go on"
    Verification(HF, [GOOD, server], 0, WeightSyncConfig(verify="off"))


@pytest.mark.parametrize(
    ("quantization", "dtype", "is_refused"),
    [
        ("", torch.bfloat16, False),
        ("unquant", None, False),
        ("fp8", torch.float8_e4m3fn, False),
        ("fp8", torch.bfloat16, True),
        ("fp8", None, True),
        ("awq", torch.bfloat16, True),
    ],
)
def test_a_server_that_quantizes_what_it_is_sent_is_refused(quantization: str, dtype: Any, is_refused: bool) -> None:
    server = replace(GOOD, quantization=quantization)
    if is_refused:
        with pytest.raises(ConfigError, match=rf"\({quantization}\).*weight_sync\.dtype=float8"):
            check_servers([server], dtype)
    else:
        check_servers([server], dtype)


@pytest.mark.parametrize(("verify", "warnings"), [("off", 1), ("sample", 0)])
def test_a_run_that_verifies_nothing_is_told_what_it_gives_up(
    verify: str, warnings: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "_check_float8", lambda config, hf: None)
    monkeypatch.setattr(build, "ServerLayout", lambda hf: None)
    build.check_weight_sync(Config(weight_sync=WeightSyncConfig(verify=verify)), HF)
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == warnings and all("may sample from other weights" in message for message in told)
