"""Stand-ins for SLURM's commands, around a real `rpp slurm-job` and real guards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_rpp.config import Config
from megatron_rpp.config.load import dump_toml
from megatron_rpp.slurm.history import History

NODES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")  # addresses are names that resolve

# One stand-in for all: notes how it was called; srun of the trainer and of the guards runs the test's own lines.
_FAKE = """#!/bin/bash
name=$(basename "$0")
printf '%s\\n' "$name $*" >> "$FAKE_LOG"
case "$name $*" in
  *"show hostnames"*) echo "${@: -1}" | tr , '\\n' ;;
  *"show job"*) echo "JobId=7 JobName=a job JobState=$FAKE_STATE EndTime=$FAKE_END QOS=(null) Account=team" ;;
  *"write batch_script"*) echo '#!/bin/bash' > "${@: -1}" ;;
  *--job-name=train*) eval "$FAKE_TRAIN" ;;
  *--job-name=guard*) eval "$FAKE_GUARD" ;;
  srun*) exec sleep 60 ;;
  sbatch*) eval "$FAKE_SBATCH" ;;
esac
"""
GUARDS = """
command=("${@: -8}")
for n in 1 2 3; do SLURMD_NODENAME=127.0.0.$n "${command[@]}" & echo $! > $RUN_DIR/guard-$n; done
wait
"""
TRAINING = 'echo "{\\"attempt\\": \\"$RPP_ATTEMPT\\"}" > $RUN_DIR/attempt'
"""A trainer whose ranks are all there."""


def metrics(steps: int) -> str:
    """A shell line that leaves the metrics of `steps` steps."""
    lines = "".join(json.dumps({"step": step}) + "\\n" for step in range(steps))
    return f"printf '{lines}' > $RUN_DIR/metrics.jsonl"


class Job:
    """A run directory and the stand-ins; `start` is one start of the job."""

    def __init__(self, root: Path, config: Config) -> None:
        self.root, self.run_dir = root, Path(config.run.dir)
        (root / "bin").mkdir()
        for name in ("srun", "sbatch", "scontrol", "scancel", "squeue"):
            (root / "bin" / name).write_text(_FAKE)
            (root / "bin" / name).chmod(0o755)
        (root / "run.toml").write_text(dump_toml(config))
        self.history = History(self.run_dir)
        self._count = 0

    def start(
        self,
        train: str,
        *words: str,
        state: str = "RUNNING",
        guard: str = "exec sleep 60",
        sbatch: str = "echo 8",
        env: Mapping[str, str] | None = None,
        then: Callable[[int], None] | None = None,
    ) -> int:
        """The batch script's exit code.

        train, guard, sbatch: shell lines that stand for these. then: gets the supervisor's pid.
        """
        self._count += 1
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PMI", "RPP"))}
        own |= {
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": ",".join(NODES),
            "SLURM_RESTART_COUNT": str(self._count - 1),
            "FAKE_LOG": str(self.root / "calls"),
            "FAKE_STATE": state,
            "FAKE_END": "Unknown",
            "FAKE_TRAIN": train,
            "FAKE_GUARD": guard,
            "FAKE_SBATCH": sbatch,
            "RUN_DIR": str(self.run_dir),
            **(env or {}),
        }
        argv = [sys.executable, "-m", "megatron_rpp.cli", "slurm-job", str(self.root / "run.toml"), *words]
        with (self.root / "log").open("ab") as log, subprocess.Popen(argv, env=own, stderr=log) as process:
            if then is not None:
                then(process.pid)
            return process.wait(60)

    def calls(self, name: str, *words: str) -> list[str]:
        """How a stand-in was called, where all of `words` are in it."""
        lines = (self.root / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(f"{name} ") and all(word in line for word in words)]

    def log(self) -> str:
        return (self.root / "log").read_text()

    def wait_for_file(self, name: str) -> str:
        """What is in a file of the run directory, once there is something."""
        path = self.run_dir / name
        self.wait_until(lambda: path.exists() and path.read_text() != "", str(path))
        return path.read_text()

    def wait_until(self, done: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + 40
        while not done():
            assert time.monotonic() < end, f"{what} did not come\n{self.log()}"
            time.sleep(0.05)
