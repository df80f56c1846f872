"""Real SGLang servers announce themselves to a run: one is there, another joins, and leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rpp.observability.logs import log_path
from megatron_rpp.observability.writers import read_metrics
from tests.integration.test_loop import write_problems

TIMEOUT_S = 240.0  # of one wait, on a busy machine


@dataclass(frozen=True)
class Rig:
    """A run directory, its trainer and the `rpp serve` that were started."""

    run_dir: Path
    trainer: subprocess.Popen[bytes]
    serving: list[subprocess.Popen[bytes]]

    def serve(self) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "megatron_rpp.cli", "serve", str(self.run_dir.parent / "run.toml")]
        with (self.run_dir.parent / f"serve-{len(self.serving)}.txt").open("wb") as log:
            self.serving.append(subprocess.Popen(argv, stderr=log))
        return self.serving[-1]

    def said(self, number: int) -> str:
        return (self.run_dir.parent / f"serve-{number}.txt").read_text()

    def steps(self) -> list[dict[str, Any]]:
        return read_metrics(self.run_dir) if (self.run_dir / "metrics.jsonl").exists() else []

    def wait(self, is_true: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + TIMEOUT_S
        while not is_true():
            log = log_path(self.run_dir, 0)
            assert self.trainer.poll() is None, f"the trainer has ended before {what}: {log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"{what} did not come about; see {self.run_dir}"
            time.sleep(0.1)

    def wait_for_servers(self, count: int) -> None:
        """Until a step has ended whose weights went to `count` servers."""
        seen = len(self.steps())
        self.wait(lambda: any(s["sync/servers"] == count for s in self.steps()[seen:]), f"a step with {count} servers")


@pytest.fixture
def rig(tiny_model_dir: Path, tmp_path: Path) -> Iterator[Rig]:
    write_problems(tmp_path / "problems.jsonl", 40)
    run_dir = tmp_path / "run"
    (tmp_path / "run.toml").write_text(
        f"""
run = {{ dir = "{run_dir}", steps = 100000 }}
model = {{ path = "{tiny_model_dir}" }}
algorithm = {{ num_samples_per_prompt = 4 }}
rollout = {{ num_prompts = 8, max_response_tokens = 8, context_length = 32, registry = true }}
train = {{ batch_size = 32, micro_batch_size = 32 }}
optimizer = {{ lr = 1e-3 }}
checkpoint = {{ interval = 0 }}
data.train = {{ kind = "jsonl", path = "{tmp_path}/problems.jsonl" }}
"""
    )
    with (tmp_path / "trainer.txt").open("wb") as log:
        argv = [sys.executable, "-m", "tests.integration.elastic_worker", str(tmp_path / "run.toml")]
        trainer = subprocess.Popen(argv, stderr=log)
    rig = Rig(run_dir, trainer, [])
    try:
        yield rig
    finally:
        for process in (trainer, *rig.serving):
            process.kill()
            process.wait()


def test_servers_come_and_go_and_the_run_goes_on(rig: Rig) -> None:
    rig.serve()
    rig.wait_for_servers(1)
    steps_before = len(rig.steps())
    rig.serve()  # joins late
    rig.wait_for_servers(2)
    first, second = (psutil.Process(serve.pid).children(recursive=True) for serve in rig.serving)
    assert first and second
    rig.serving[1].send_signal(signal.SIGTERM)
    assert rig.serving[1].wait(TIMEOUT_S) == 0
    assert rig.said(1).endswith("rpp serve: asked to leave; the server is gone\n") and "Traceback" not in rig.said(1)
    rig.wait_for_servers(1)
    (rig.run_dir / "stop").touch()
    assert rig.trainer.wait(TIMEOUT_S) == 0, (rig.run_dir.parent / "trainer.txt").read_text()[-3000:]
    assert rig.serving[0].wait(TIMEOUT_S) == 0 and "has ended" in rig.said(0)
    assert not any(map(runs, [*first, *second])), "a server outlives the run"
    check_steps(rig.steps(), steps_before)
    assert [rig.said(number).count("announced http") for number in (0, 1)] == [1, 1]


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE  # whom nobody has reaped yet
    except psutil.NoSuchProcess:
        return False


def check_steps(steps: list[dict[str, Any]], steps_before: int) -> None:
    """No step is missing, and each was sampled from its weights, whoever served it."""
    assert [s["step"] for s in steps] == list(range(len(steps))) and len(steps) >= steps_before + 2
    assert [s["policy_version"] for s in steps] == list(range(len(steps)))
    assert max(s["mismatch/logprob_abs_mean"] for s in steps) < 1e-3, "a server sampled from other weights"
