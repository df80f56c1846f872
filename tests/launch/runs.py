"""A run of the demo's model as a job of the test cluster: what it is started with, and how far it is."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_rpp.observability.writers import read_metrics
from megatron_rpp.slurm.history import History, Try
from tests.launch.cluster import REPOSITORY, Cluster

CONFIG = "examples/cluster_cpu.toml"


@dataclass(frozen=True)
class Run:
    """`words` are a user's: the shipped configuration, and where his model, data and run are."""

    cluster: Cluster
    dir: Path
    words: tuple[str, ...]

    @classmethod
    def of_demo(cls, cluster: Cluster, demo: Path, run_dir: Path, *more: str) -> Run:
        model, data = f"--model.path={demo / 'init'}", f"--data.train.path={demo / 'train.jsonl'}"
        return cls(cluster, run_dir, (CONFIG, model, data, f"--run.dir={run_dir}", *more))

    def steps(self) -> list[dict[str, Any]]:
        return read_metrics(self.dir)

    def tries(self) -> list[Try]:
        return History(self.dir).tries()

    def wait_for_step(self, step: int, timeout_s: float = 240.0) -> None:
        """Until the metrics of `step` are there."""
        self.wait_until(lambda: any(each["step"] >= step for each in self.steps()), f"step {step}", timeout_s)

    def wait_until(self, done: Callable[[], bool], what: str, timeout_s: float = 240.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < deadline, f"{what} did not come in {timeout_s:g} s\n{self.story()}"
            time.sleep(0.2)

    def story(self) -> str:
        """The ends of the run's logs."""
        logs = sorted((self.dir / "logs").glob("*.txt"))
        return "\n".join(f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-25:]) for path in logs)

    def check_complete(self, steps: int) -> None:
        """Every step once, each on rollouts of its own version; it has learnt; the last checkpoint is there."""
        assert [each["step"] for each in self.steps()] == list(range(steps)), self.story()
        assert [each["policy_version"] for each in self.steps()] == list(range(steps))
        assert all(each["grad_norm"] > 0 for each in self.steps())
        rewards = [each["reward/shaped_mean"] for each in self.steps()]
        assert rewards[-1] > rewards[0] + 0.2, f"its answers have not become shorter: {rewards}"
        assert (self.dir / "checkpoints" / f"step-{steps:06d}").is_dir()
        assert self.tries()[-1].ending == Try.DONE

    def check_no_orphans(self, nodes: Sequence[str], limit_s: float = 20.0) -> None:
        """On `nodes` nothing of the job is left but SLURM's own daemons."""
        end = time.monotonic() + limit_s
        while (left := self._processes(nodes)) and time.monotonic() < end:
            time.sleep(0.2)
        assert not left, f"left behind: {left}"

    def _processes(self, nodes: Sequence[str]) -> list[str]:
        found = []
        for node in nodes:
            for pid in self.cluster.pids(node):
                try:
                    process = psutil.Process(pid)
                    name, line = process.name(), " ".join(process.cmdline())
                    if process.status() != psutil.STATUS_ZOMBIE and not name.startswith("slurm"):
                        found.append(f"{node}: {pid} {name} {line}")
                except psutil.NoSuchProcess:
                    continue
        return found


def shipped_script(name: str, folder: Path) -> Path:
    """A copy of launch/slurm/NAME with the account set, as a user edits it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (REPOSITORY / "launch" / "slurm" / name).read_text()
    assert "--account=CHANGE_ME" in text
    path = folder / name
    path.write_text(text.replace("--account=CHANGE_ME", "--account=team"))
    shutil.copymode(REPOSITORY / "launch" / "slurm" / name, path)
    return path
