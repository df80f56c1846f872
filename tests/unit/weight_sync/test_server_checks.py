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
from megatron_rpp.rollout.probe import ServerInfo
from megatron_rpp.weight_sync import build
from megatron_rpp.weight_sync.server_checks import check_servers, why_unverifiable
from megatron_rpp.weight_sync.transport import WeightSyncError
from megatron_rpp.weight_sync.verification import Verification

GOOD = Server("http://good:1", ServerInfo(8, "cpu"), 0)
# Of the policy nothing else is asked before a refusal.
POLICY: Any = SimpleNamespace(hf=SimpleNamespace(num_layers=2), chunks=())


def odd_server(**info: Any) -> Server:
    return Server("http://odd:1", replace(GOOD.info, **info), 0)


@pytest.mark.parametrize("size", ["ep_size", "dp_size", "pp_size"])
def test_a_layout_that_cannot_be_predicted_is_named_with_what_to_change_before_anything_is_sent(size: str) -> None:
    server, flag = odd_server(**{size: 8}), f"--{size[:2]}-size"
    words = rf"http://odd:1:? runs with .*\({size}=8\).*without {flag}.*weight_sync\.verify=off"
    with pytest.raises(ConfigError, match=words):
        check_servers([GOOD, server], None)
    with pytest.raises(WeightSyncError, match=words) as refused:
        Verification(POLICY, [GOOD, server], 0, None, WeightSyncConfig())
    assert refused.value.servers == {server.url}, "of a newcomer, too, and the others go on"
    Verification(POLICY, [GOOD, server], 0, None, WeightSyncConfig(verify="off"))


def test_a_verification_of_nobody_is_no_proof() -> None:
    for verify in ("full", "off"):
        with pytest.raises(AssertionError, match="nobody to verify"):
            Verification(POLICY, [], 0, None, WeightSyncConfig(verify=verify))


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
    server, words = odd_server(quantization=quantization), rf"\({quantization}\).*weight_sync\.dtype=float8"
    if is_refused:
        with pytest.raises(ConfigError, match=words):
            check_servers([server], dtype)
        with pytest.raises(WeightSyncError, match=words):
            Verification(POLICY, [GOOD, server], 0, dtype, WeightSyncConfig())
    else:
        check_servers([server], dtype)
        assert why_unverifiable(server, dtype) is None


def test_a_server_whose_quantized_tensors_are_left_out_of_the_comparison_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, unverified = odd_server(quantization="fp8"), ("_proj.",)
    check_servers([GOOD, server], torch.bfloat16, unverified)
    (warning,) = caplog.messages
    assert "http://odd:1 quantizes its weights (fp8)" in warning and "weight_sync.unverified" in warning
    assert why_unverifiable(server, torch.bfloat16, unverified) is None, "as a newcomer"


@pytest.mark.parametrize(("verify", "warnings"), [("off", 1), ("sample", 0)])
def test_a_run_that_verifies_nothing_is_told_what_it_gives_up(
    verify: str, warnings: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "_check_float8", lambda config, hf: None)
    monkeypatch.setattr(build, "ServerLayout", lambda hf: None)
    build.check_weight_sync(Config(weight_sync=WeightSyncConfig(verify=verify)), POLICY.hf)
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == warnings and all("may sample from other weights" in message for message in told)
