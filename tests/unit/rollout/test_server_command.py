"""The command line of a spawned server follows the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config, RunConfig, WeightSyncConfig
from megatron_rpp.rollout import sglang_server
from megatron_rpp.rollout.fleet import ServerFleet
from megatron_rpp.rollout.server_command import server_command
from tests.support.sglang_parts import layer_skipper


def after(command: list[str], flag: str) -> str:
    assert command.count(flag) == 1, f"{flag} in {command}"
    return command[command.index(flag) + 1]


def test_an_fp8_server_expects_scaled_blocks_and_loads_no_weights_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    command = server_command(str(tmp_path), RolloutConfig(), "float8", "cuda", 1)
    assert after(command, "--dtype") == "bfloat16" and after(command, "--load-format") == "dummy"
    override = json.loads(after(command, "--json-model-override-args"))
    assert override["quantization_config"]["quant_method"] == "fp8"
    assert override["quantization_config"]["weight_block_size"] == [128, 128]


def test_an_fp8_server_is_told_of_the_layers_that_stay_bfloat16() -> None:
    command = server_command("/m", RolloutConfig(), "float8", "cuda", 1, bf16_layers=[1])
    ignored = json.loads(after(command, "--json-model-override-args"))["quantization_config"]["modules_to_not_convert"]
    is_layer_skipped = layer_skipper()
    for part in (
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.experts",
        "block_sparse_moe.experts",
    ):
        skipped = [is_layer_skipped(f"model.layers.{i}.{part}", ignored) for i in (0, 1, 10, 11)]
        assert skipped == [False, True, False, False], part


def test_fp8_on_a_cpu_is_refused_before_a_server_starts() -> None:
    with pytest.raises(ConfigError, match=r"weight_sync\.dtype=float8 .* choose auto, float32 or bfloat16"):
        server_command("/m", RolloutConfig(), "float8", "cpu", 1)


def test_weights_are_loaded_where_there_are_any(tmp_path: Path) -> None:
    assert after(server_command(str(tmp_path), RolloutConfig(), "bfloat16", "cuda", 1), "--load-format") == "dummy"
    (tmp_path / "model.safetensors").touch()
    assert "--load-format" not in server_command(str(tmp_path), RolloutConfig(), "bfloat16", "cuda", 1)


def test_memory_is_released_on_gpus_only() -> None:
    rollout = RolloutConfig(release_memory=True)
    assert "--enable-memory-saver" in server_command("/m", rollout, "bfloat16", "cuda", 1)
    assert "--enable-memory-saver" not in server_command("/m", rollout, "bfloat16", "cpu", 1), "SGLang dies of it there"
    assert "--enable-memory-saver" not in server_command("/m", RolloutConfig(), "bfloat16", "cuda", 1)


def test_each_server_of_a_run_has_its_own_port_log_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, str | None, str]] = []

    def command(model: str, rollout: RolloutConfig, dtype: str, device: str, port: int, **more: Any) -> list[str]:
        seen.append((port, more["base_gpu"], more["weight_loader"], dtype))
        return ["true"]

    monkeypatch.setattr(sglang_server, "server_command", command)
    monkeypatch.setattr(sglang_server, "claim_port", lambda port, host: port)
    rollout = RolloutConfig(num_servers=3, server_tensor=2, port=30000)
    sync = WeightSyncConfig(transports=("delta", "disk"), dtype="bfloat16")
    ServerFleet(Config(run=RunConfig(dir=str(tmp_path)), rollout=rollout, weight_sync=sync)).stop()
    loader = "megatron_rpp.rollout.in_server.delta_loader.apply"
    assert seen == [(30000 + i, 2 * i, loader, "bfloat16") for i in range(3)]
    assert sorted(log.name for log in (tmp_path / "logs").iterdir()) == [f"sglang-{i}.txt" for i in range(3)]


def test_gpus_and_loader_reach_the_command_line() -> None:
    command = server_command("/m", RolloutConfig(), "bfloat16", "cuda", 1, base_gpu=4, weight_loader="a.b.c")
    assert after(command, "--base-gpu-id") == "4" and after(command, "--custom-weight-loader") == "a.b.c"
    plain = server_command("/m", RolloutConfig(), "bfloat16", "cpu", 1)
    assert "--base-gpu-id" not in plain and "--custom-weight-loader" not in plain
