"""Spawning, waiting and stopping, with small programs in the server's place."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.device import sglang_cpu
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.rollout.server_command import server_command, server_environment
from megatron_rpp.rollout.sglang_server import SGLangServer

DIES = "import sys; print('weights are corrupt', flush=True); sys.exit(3)"
HANGS = "import time; print('still loading', flush=True); time.sleep(60)"
ANSWERS = """
import http.server, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path in ("/health", "/server_info") else 404)
        self.end_headers()
        self.wfile.write(b'{"tp_size": 1, "device": "cpu"}')
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
DIES_ONCE = """
import pathlib, sys
mark = pathlib.Path(sys.argv[2])
if not mark.exists():
    mark.touch()
    sys.exit(sys.argv[3])
"""


@contextmanager
def fake(program: str, tmp_path: Path, port: int = 0, last_words: str = "") -> Iterator[SGLangServer]:
    def command(chosen: int) -> list[str]:
        return [sys.executable, "-c", program, str(chosen), str(tmp_path / "mark"), last_words]

    log_path = tmp_path / "logs" / "sglang.txt"
    server = SGLangServer("", RolloutConfig(port=port), dtype="float32", log_path=log_path, command=command)
    try:
        yield server
    finally:
        server.stop()


def test_a_port_in_use_is_reported_before_anything_is_spawned(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with fake(ANSWERS, tmp_path, port) as server:
            with pytest.raises(ValueError, match=f"rollout.port={port} is in use on 127.0.0.1; choose another"):
                server.start()
            assert server.pid is None


def test_an_early_death_shows_the_end_of_the_log(tmp_path: Path) -> None:
    with fake(DIES, tmp_path) as server:
        server.start()
        with pytest.raises(RolloutError, match=r"(?s)exit status 3.*weights are corrupt"):
            server.wait_ready(20)
        assert not server.is_alive()


def test_a_server_that_never_answers_is_stopped_at_the_deadline(tmp_path: Path) -> None:
    with fake(HANGS, tmp_path) as server:
        server.start()
        pid = server.pid
        with pytest.raises(RolloutError, match=r"(?s)startup_deadline_s=1\.5.*still loading"):
            server.wait_ready(1.5)
        assert pid is not None and not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    "last_words",
    ["[Errno 98] Address already in use", "in _freeze_gc_after_server_warmup\n" + "at requests\n" * 60],
    ids=["port_taken", "busy_machine"],
)
def test_a_death_that_another_attempt_may_avoid_gets_one(tmp_path: Path, last_words: str) -> None:
    with fake(DIES_ONCE + ANSWERS, tmp_path, last_words=last_words) as server:
        server.start()
        server.wait_ready(20)
        assert server.is_alive()
        assert last_words not in server.log_tail(), "the tail is of the present process"


def test_stop_ends_the_children_too_and_the_server_can_start_again(tmp_path: Path) -> None:
    with fake(ANSWERS, tmp_path) as server:
        server.start()
        server.wait_ready(20)
        assert server.pid is not None
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        assert len(family) == 3, "die_with_parent, the program, and its child"
        server.stop()
        assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
        assert not server.is_alive() and server.pid is None
        server.start()
        server.wait_ready(20)
        assert server.is_alive()


def test_is_alive_notices_a_death(tmp_path: Path) -> None:
    with fake(ANSWERS, tmp_path) as server:
        server.start()
        server.wait_ready(20)
        assert server.pid is not None
        psutil.Process(server.pid).kill()
        end = time.monotonic() + 5
        while server.is_alive() and time.monotonic() < end:
            time.sleep(0.01)
        assert not server.is_alive()


def test_the_users_server_args_come_last_so_that_they_win() -> None:
    rollout = RolloutConfig(server_args=("--attention-backend", "other"), context_length=77)
    command = server_command("/m", rollout, "bfloat16", "cpu", 1234)
    assert command[-2:] == ["--attention-backend", "other"]
    assert command[command.index("--context-length") + 1] == "77"
    assert command[command.index("--host") + 1] == "127.0.0.1"


def test_a_gpu_server_gets_no_cpu_flags() -> None:
    rollout = RolloutConfig()
    command = server_command("/m", rollout, "bfloat16", "cuda", 1234)
    assert "--attention-backend" not in command and "--max-total-tokens" not in command
    assert "SGLANG_USE_CPU_ENGINE" not in server_environment({}, rollout, "cuda")
    assert "PYTHONPATH" not in server_environment({}, rollout, "cuda"), "stand-ins would hide real packages"


def test_the_trainers_rank_does_not_reach_the_server() -> None:
    base = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "HOME": "/h"}
    env = server_environment(base, RolloutConfig(), "cpu")
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(env)
    assert env["HOME"] == "/h"


def test_the_ranks_one_compiling_process_is_not_the_servers_and_the_users_setting_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_rpp.rollout.server_command.SET_HERE", {"TORCHINDUCTOR_COMPILE_THREADS": "1"})
    for threads, handed_on in (("1", None), ("8", "8")):
        env = server_environment({"TORCHINDUCTOR_COMPILE_THREADS": threads}, RolloutConfig(), "cuda")
        assert env.get("TORCHINDUCTOR_COMPILE_THREADS") == handed_on
    monkeypatch.setattr("megatron_rpp.rollout.server_command.SET_HERE", {})  # it was in the environment before us
    env = server_environment({"TORCHINDUCTOR_COMPILE_THREADS": "1"}, RolloutConfig(), "cuda")
    assert env["TORCHINDUCTOR_COMPILE_THREADS"] == "1"


def test_stand_ins_serve_only_for_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_cpu, "find_spec", lambda name: object() if name == "triton" else None)
    names = [Path(folder).name for folder in sglang_cpu.python_path()]
    assert names == ["plugin", "for_torchvision", "for_sgl_kernel"]
