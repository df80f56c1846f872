"""Signals that ask to save, and the processes that they must not end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


LISTEN = """
import os, signal, subprocess, sys, time
from megatron_rpp.parallel import rank_process, stop_request
rank_process.take_signals("slurm", os.environ, saves={saves})
"""


def rank(body: str, *, saves: bool = True, **env: str) -> subprocess.Popen[bytes]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    argv = [sys.executable, "-c", LISTEN.format(saves=saves) + body]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, env={**clean, **env})
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


WAIT = "print('ready', flush=True)\nwhile not stop_request.is_requested(): time.sleep(0.01)\nsys.exit(75)"


@pytest.mark.parametrize(
    ("number", "env", "saves", "code"),
    [
        (signal.SIGUSR1, {}, True, 75),
        (signal.SIGTERM, {"SLURM_JOB_ID": "7"}, True, 75),
        (signal.SIGTERM, {}, True, 143),  # Ctrl-C's kin: now
        (signal.SIGTERM, {"SLURM_JOB_ID": "7", "RPP_LOCAL_JOB": "local.1"}, True, 143),  # our launcher ends its ranks
        (signal.SIGTERM, {"SLURM_JOB_ID": "7"}, False, 143),  # a command that has nothing to save
    ],
)
def test_which_signal_asks_to_save(number: signal.Signals, env: dict[str, str], saves: bool, code: int) -> None:
    with rank(WAIT, saves=saves, **env) as process:
        process.send_signal(number)
        assert process.wait(timeout=20) == code


def test_a_child_process_is_not_ended_by_the_request() -> None:
    body = (
        "with stop_request.held_for_child(): child = subprocess.Popen(['sleep', '60'])\n"
        "print('ready', flush=True)\n"
        "child.send_signal(signal.SIGUSR1); time.sleep(0.2); left = child.poll(); child.kill()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"  # and the parent still takes its own
        "sys.exit(0 if left is None and stop_request.is_requested() else 1)"
    )
    with rank(body) as process:
        assert process.wait(timeout=20) == 0


def test_a_rank_does_not_outlive_the_launcher_of_another_make(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    body = LISTEN.format(saves=True) + f"open({str(pid_file)!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(60)"
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {body!r}])"]
    )
    deadline = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pid = int(pid_file.read_text())
    assert alive(pid)
    launcher.kill()
    launcher.wait()
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
