"""The reward model's server is kept alive at one URL, with small programs in its place."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megatron_rpp.config.preflight import claim_port
from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config
from megatron_rpp.rollout import reward_model_server
from megatron_rpp.rollout.probe import examine
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.rollout.reward_model_server import RewardModelServer, reward_model_command
from megatron_rpp.rollout.server_command import server_environment
from megatron_rpp.rollout.sglang_server import SGLangServer
from tests.unit.rollout.fake_sglang import SPAWNED

DIES = "import sys; print('weights are corrupt', flush=True); sys.exit(3)"
HANGS = "import time; print('still loading', flush=True); time.sleep(60)"


@contextmanager
def kept(program: str, tmp_path: Path, startup_s: float = 60.0, health_s: float = 60.0) -> Iterator[RewardModelServer]:
    def command(port: int) -> list[str]:
        return [sys.executable, "-c", program, str(port), str(tmp_path / "corrupt")]

    server = SGLangServer(
        "", RolloutConfig(), dtype="", log_path=tmp_path / "reward-model.txt", port=claim_port(0), command=command
    )
    keeper = RewardModelServer(server, startup_s, health_s, backoff_s=0.1)
    keeper.start()
    try:
        yield keeper
    finally:
        keeper.stop()


def pid_of(keeper: RewardModelServer) -> int:
    pid = keeper._server.pid
    assert pid is not None
    return pid


def await_answer(keeper: RewardModelServer, but_not_of: int) -> None:
    end = time.monotonic() + 30
    while keeper._server.pid in (None, but_not_of) or isinstance(examine(keeper.url, 2.0), str):
        assert time.monotonic() < end, "it was not started again"
        time.sleep(0.05)


def test_a_dead_server_is_started_again_at_its_url(tmp_path: Path) -> None:
    with kept(SPAWNED, tmp_path) as keeper:
        keeper.wait_ready()
        first, url = pid_of(keeper), keeper.url
        os.kill(first, signal.SIGKILL)
        await_answer(keeper, but_not_of=first)
        assert keeper.url == url, "who has the URL would ask nobody"
        last = pid_of(keeper)
    assert not psutil.pid_exists(last), "the server outlives its keeper"


def test_a_server_that_cannot_be_started_again_is_tried_until_it_can(tmp_path: Path) -> None:
    with kept(SPAWNED, tmp_path) as keeper:
        keeper.wait_ready()
        first = pid_of(keeper)
        (tmp_path / "corrupt").touch()
        os.kill(first, signal.SIGKILL)
        end = time.monotonic() + 30
        while "weights are corrupt" not in (tmp_path / "reward-model.txt").read_text():
            assert time.monotonic() < end
            time.sleep(0.05)
        (tmp_path / "corrupt").unlink()
        await_answer(keeper, but_not_of=first)


def test_a_silent_server_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_model_server, "_PROBE_S", 0.3)
    with kept(SPAWNED, tmp_path, health_s=0.5) as keeper:
        keeper.wait_ready()
        first = pid_of(keeper)
        os.killpg(first, signal.SIGSTOP)
        await_answer(keeper, but_not_of=first)


@pytest.mark.parametrize(
    ("program", "startup_s", "expected"),
    [(DIES, 60.0, r"exit status 3.*weights are corrupt"), (HANGS, 1.0, r"startup_deadline_s=1 s.*still load")],
)
def test_a_first_start_that_fails_ends_the_wait_with_the_log(
    tmp_path: Path, program: str, startup_s: float, expected: str
) -> None:
    with (
        kept(program, tmp_path, startup_s) as keeper,
        pytest.raises(RolloutError, match=f"(?s)the reward model's server: .*{expected}"),
    ):
        keeper.wait_ready()


def test_stopping_one_that_still_loads_does_not_wait_for_it(tmp_path: Path) -> None:
    with kept(HANGS, tmp_path) as keeper:
        time.sleep(0.2)
        start = time.monotonic()
        keeper.stop()
        assert time.monotonic() - start < 5


def after(command: list[str], flag: str) -> str:
    assert command.count(flag) == 1, f"{flag} in {command}"
    return command[command.index(flag) + 1]


def test_it_takes_the_gpus_behind_the_spawned_servers() -> None:
    reward = RewardConfig(model_path="/rm", model_server_args=("--tp-size", "2"))
    spawned = Config(rollout=RolloutConfig(num_servers=3, server_tensor=2), reward=reward)
    command = reward_model_command(spawned, "cuda")(30000)
    assert after(command, "--model-path") == "/rm" and after(command, "--base-gpu-id") == "6"
    assert command[-2:] == ["--tp-size", "2"], "the user's arguments do not win"
    attached = Config(rollout=RolloutConfig(urls=("http://a:1",)), reward=reward)
    assert after(reward_model_command(attached, "cuda")(30000), "--base-gpu-id") == "0"
    assert int(after(reward_model_command(spawned, "cpu")(30000), "--max-total-tokens")) >= 20_000


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_model_classes_of_ours_go_before_sglangs(device: str) -> None:
    package = reward_model_server.MODEL_PACKAGE
    env = server_environment({}, RolloutConfig(), device, model_package=package)
    assert env["SGLANG_EXTERNAL_MODEL_PACKAGE"] == package
    assert server_environment({}, RolloutConfig(), "cuda").get("SGLANG_EXTERNAL_MODEL_PACKAGE") is None
