"""Arguments of servers whose weights could not be verified."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.performance import Fp8Config
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config, WeightSyncConfig
from megatron_rpp.config.server_arg_checks import check_server_args


def asking_for(*words: str) -> Config:
    return Config(rollout=RolloutConfig(server_args=words))


@pytest.mark.parametrize(
    "words",
    [
        ("--ep-size", "8"),
        ("--mem-fraction-static", "0.8", "--ep=2"),
        ("--expert-parallel-size", "2", "--log-level", "info"),
        ("--data-parallel-size", "2"),
        ("--attn-dp-size", "2"),
        ("--pp-size=2",),
    ],
    ids=" ".join,
)
def test_a_layout_that_cannot_be_verified_is_refused_by_its_flag(words: tuple[str, ...]) -> None:
    config = asking_for(*words)
    with pytest.raises(
        ConfigError, match=r"rollout\.server_args=--(ep|ex|da|at|pp).* cannot be verified; leave it out"
    ):
        check_server_args(config)
    check_server_args(replace(config, weight_sync=WeightSyncConfig(verify="off")))


@pytest.mark.parametrize("words", [("--quantization", "fp8"), ("--quantization=awq",)], ids=" ".join)
def test_weights_that_servers_quantize_are_refused_where_they_are_compared(words: tuple[str, ...]) -> None:
    config = asking_for(*words)
    for refused in (config, replace(config, weight_sync=WeightSyncConfig(dtype="bfloat16"))):
        with pytest.raises(ConfigError, match=r"rollout\.server_args=--quantization (fp8|awq): .*dtype=float8"):
            check_server_args(refused)
    for sync in ({"verify": "off"}, {"dtype": "float8"}, {"unverified": ("_proj.",)}):
        check_server_args(replace(config, weight_sync=WeightSyncConfig(**sync)))
    check_server_args(replace(config, fp8=Fp8Config(recipe="blockwise")))


@pytest.mark.parametrize(
    "words",
    [("--ep-size", "1"), ("--dp-size=1",), ("--log-level", "info"), ("--quantization", "unquant"), ()],
    ids=" ".join,
)
def test_one_part_is_no_division(words: tuple[str, ...]) -> None:
    check_server_args(asking_for(*words))
