"""`rpp serve` as a user meets it: refusals before anything is started, its seat on the host, and its end."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from megatron_rpp.commands import serve
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config
from megatron_rpp.parallel.environment import JobPlace
from megatron_rpp.parallel.rendezvous import open_store
from megatron_rpp.rollout.registry import Registry
from megatron_rpp.rollout.server_command import server_environment
from tests.unit import serve_child
from tests.unit.test_cli import MODEL


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with run.toml, a model's config.json and a data file; all of them valid."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    (tmp_path / "run.toml").write_text(
        f'run.dir = "{tmp_path}/run"\nmodel.path = "{tmp_path}/model"\ndata.train.path = "{tmp_path}/data.jsonl"\n'
    )
    return tmp_path


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--rollout.urls=http://h:1"], r"rollout\.urls and rollout\.registry are both set"),
        (["--weight_sync.dtype=float8"], r"weight_sync\.dtype=float8 needs servers on GPUs"),
        (["--rollout.server_tensor=3"], r"rollout\.server_tensor=3 must divide num_attention_heads=4"),
        (["--rollout.port={port}"], r"rollout\.port=\d+ is in use"),
        (["--rollout.port={port}", "--host=127.0.0.1"], r"rollout\.port=\d+ is in use on 127\.0\.0\.1"),
        (["--host", "0.0.0.0"], r"--host=0\.0\.0\.0 is no address to announce"),
        (["--host"], r"--host= is no address to announce"),
        (["--host=nowhere.invalid"], r"nowhere\.invalid does not resolve .*pass --host=ADDRESS"),
        (["--host=192.0.2.1"], r"192\.0\.2\.1 must be an address of this host"),
    ],
)
def test_what_cannot_serve_is_refused_before_anything_is_started(
    words: list[str], complaint: str, project: Path, taken_port: int
) -> None:
    before = {p.pid for p in psutil.Process().children()}
    with pytest.raises(ConfigError, match=complaint):
        serve.run(["serve", str(project / "run.toml"), *(word.format(port=taken_port) for word in words)])
    assert {p.pid for p in psutil.Process().children()} <= before and not (project / "run" / "logs").exists()


def test_each_task_of_srun_has_gpus_a_port_and_a_log_of_its_own() -> None:
    config, host = Config(rollout=RolloutConfig(server_tensor=2)), socket.gethostname()
    assert serve.find_seat(config, {"SLURM_LOCALID": "3"}) == serve.Seat(host, 3, f"sglang-{host}-3.txt", 6)
    eight = {"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    assert serve.find_seat(config, eight).base_gpu == 6
    own = {"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "6,7"}
    assert serve.find_seat(config, own).base_gpu == 0, "srun has given it GPUs of its own"
    assert serve.find_seat(config, {}).base_gpu == 0


def test_what_srun_and_mpi_say_of_a_task_does_not_reach_its_server() -> None:
    base = {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "PMI_FD": "7",
        "PMI_RANK": "3",
        "RPP_ATTEMPT": "7.0",
        "HOME": "/h",
    }
    env = server_environment(base, RolloutConfig(), "cpu")
    assert not [name for name in env if name.startswith(("SLURM_", "PMI_", "RPP_"))] and env["HOME"] == "/h"


def test_a_server_for_other_hosts_joins_weight_update_groups_by_the_interface_that_it_listens_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_rpp.parallel.interfaces.interface_to", {"10.0.0.2": "eth7"}.get)
    env = server_environment({}, RolloutConfig(), "cpu", "10.0.0.2")
    assert env["GLOO_SOCKET_IFNAME"] == "eth7" and env["NCCL_SOCKET_IFNAME"] == "=eth7"
    assert "GLOO_SOCKET_IFNAME" not in server_environment({}, RolloutConfig(), "cpu", "127.0.0.1")
    assert (
        server_environment({"GLOO_SOCKET_IFNAME": "ib0"}, RolloutConfig(), "cpu", "10.0.0.2")["GLOO_SOCKET_IFNAME"]
        == "ib0"
    )


def test_killed_it_leaves_no_server_behind(project: Path) -> None:
    run_dir = project / "run"
    store = open_store(JobPlace(0, 1, 0, 1, "single", "7.0", "here"), str(run_dir), timedelta(seconds=10))
    registry = Registry(store, "7.0", 30.0)
    argv = [sys.executable, serve_child.__file__, str(project / "run.toml")]
    serving = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(registry.entries()) == 1)
        family = psutil.Process(serving.pid).children(recursive=True)
        assert len(family) == 2, "die_with_parent and the program"
        serving.kill()
        wait_for(lambda: not any(p.is_running() for p in family))
    finally:
        serving.kill()
        serving.wait()
    assert len(list((run_dir / "logs").glob(f"sglang-{socket.gethostname()}-*.txt"))) == 1


def wait_for(is_true: Callable[[], bool], timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)
