"""What the supervisor makes of each ending, with stand-ins for SLURM's commands; tests/launch has the real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rpp import cli
from megatron_rpp.config import Config
from megatron_rpp.config.load import dump_toml
from megatron_rpp.slurm.history import History, Try

# One stand-in for all: notes how it was called; `srun` of the trainer runs the test's own line.
FAKE = """#!/bin/bash
name=$(basename "$0")
printf '%s\\n' "$name $*" >> "$FAKE_LOG"
case "$name $*" in
  *"show hostnames"*) echo "${@: -1}" | tr , '\\n' ;;
  *"show job"*) echo "JobId=7 JobName=rpp JobState=$FAKE_STATE TimeLimit=01:00:00 NumNodes=2 QOS=(null) Account=team" ;;
  *"write batch_script"*) echo '#!/bin/bash' > "${@: -1}" ;;
  *--job-name=train*) eval "$FAKE_TRAIN" ;;
  *--job-name=guard*) eval "$FAKE_GUARD" ;;
  srun*) exec sleep 60 ;;
  sbatch*) echo 8 ;;
esac
"""
NODES = ("127.0.0.1", "127.0.0.2")  # addresses are names that resolve
GUARDS = """
command=("${@: -8}")
SLURMD_NODENAME=127.0.0.1 "${command[@]}" & echo $! > $RUN_DIR/guard-1
SLURMD_NODENAME=127.0.0.2 "${command[@]}" & echo $! > $RUN_DIR/guard-2
wait
"""


class Job:
    """A run directory and the stand-ins; `start` is one start of the job."""

    def __init__(self, root: Path, config: Config) -> None:
        self.root, self.run_dir = root, Path(config.run.dir)
        (root / "bin").mkdir()
        for name in ("srun", "sbatch", "scontrol", "scancel"):
            (root / "bin" / name).write_text(FAKE)
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
        then: Callable[[int], None] | None = None,
    ) -> int:
        """The batch script's exit code. train, guard: shell lines that stand for these steps. then: gets its pid."""
        self._count += 1
        env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PMI", "RPP"))}
        env |= {
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": ",".join(NODES),
            "SLURM_RESTART_COUNT": str(self._count - 1),
            "FAKE_LOG": str(self.root / "calls"),
            "FAKE_STATE": state,
            "FAKE_TRAIN": train,
            "FAKE_GUARD": guard,
            "RUN_DIR": str(self.run_dir),
        }
        argv = [sys.executable, "-m", "megatron_rpp.cli", "slurm-job", str(self.root / "run.toml"), *words]
        with (self.root / "log").open("ab") as log, subprocess.Popen(argv, env=env, stderr=log) as process:
            if then is not None:
                then(process.pid)
            return process.wait(60)

    def calls(self, name: str) -> list[str]:
        return [line for line in (self.root / "calls").read_text().splitlines() if line.startswith(f"{name} ")]

    def log(self) -> str:
        return (self.root / "log").read_text()


@pytest.fixture
def job(make: Callable[..., Config], tmp_path: Path) -> Job:
    changes = {"run.dir": str(tmp_path / "run"), "run.steps": 3, "parallel.data": 2, "slurm.max_tries": 2}
    return Job(tmp_path, make({**changes, "watchdog.heartbeat_deadline_s": 5.0, "slurm.doctor": False}))


def wait_for(path: Path) -> None:
    """Until `path` holds something."""
    end = time.monotonic() + 30
    while not path.exists() or not path.read_text():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.1)


def metrics(steps: int) -> str:
    """A shell line that leaves the metrics of `steps` steps."""
    lines = "".join(json.dumps({"step": step}) + "\\n" for step in range(steps))
    return f"printf '{lines}' > $RUN_DIR/metrics.jsonl"


def test_a_complete_run_ends_with_0_and_is_not_requeued(job: Job) -> None:
    assert job.start(f"{metrics(3)}; exit 0") == 0
    assert [each.ending for each in job.history.tries()] == [Try.DONE]
    assert not [call for call in job.calls("scontrol") if "requeue" in call] and not job.calls("sbatch")


def test_exit_code_0_of_srun_is_not_believed_where_steps_are_missing(job: Job) -> None:
    assert job.start(f"{metrics(2)}; exit 0") == 75
    assert job.history.tries()[0].ending == Try.FAILED and "scontrol requeue 7" in job.calls("scontrol")


def test_a_users_mistake_is_not_tried_again(job: Job) -> None:
    assert job.start("exit 2") == 2
    assert "scontrol requeue 7" not in job.calls("scontrol")


def test_a_job_that_fails_without_a_step_is_given_up_after_max_tries(job: Job) -> None:
    assert [job.start("exit 1"), job.start("exit 1")] == [75, 1]
    assert job.calls("scontrol").count("scontrol requeue 7") == 1
    assert "given up: 2 tries in a row have finished no step (slurm.max_tries=2)" in job.log()


def test_a_job_that_gets_on_between_failures_is_not_given_up(job: Job) -> None:
    assert [job.start(f"{metrics(steps)}; exit 1") for steps in (1, 2)] == [75, 75]


def test_a_job_that_was_cancelled_is_not_requeued(job: Job) -> None:
    assert job.start("exit 75", state="CANCELLED") == 75
    assert "scontrol requeue 7" not in job.calls("scontrol")


def test_usr1_reaches_the_trainer_and_the_job_is_requeued(job: Job) -> None:
    line = "trap 'kill $!; exit 75' USR1; echo > $RUN_DIR/ready; sleep 60 & wait"

    def signal_it(pid: int) -> None:
        wait_for(job.run_dir / "ready")
        os.kill(pid, signal.SIGUSR1)

    assert job.start(line, then=signal_it) == 75
    assert [each.ending for each in job.history.tries()] == [Try.STOPPED]
    assert "scontrol requeue 7" in job.calls("scontrol")


def test_the_cause_that_a_rank_reported_comes_first(job: Job) -> None:
    report = {"rank": 1, "host": "b", "kind": "error", "message": "no more memory", "lost_hosts": [], "time": 1.0}
    text = json.dumps({"by": {"rank": 1, "host": "b"}, **report})
    folder = "$RUN_DIR/failures/7.$SLURM_RESTART_COUNT"
    job.start(f"mkdir -p {folder}; echo '{text}' > {folder}/rank-1.json; exit 1")
    assert job.history.tries()[0].cause == "rank 1 on b: no more memory"
    assert "rpp slurm-job: rank 1 on b: no more memory" in job.log()


def test_steps_get_the_users_words_and_the_name_of_the_attempt(job: Job) -> None:
    job.start(f"{metrics(3)}; echo $RPP_ATTEMPT > $RUN_DIR/attempt", "--run.seed=5")
    [train] = [call for call in job.calls("srun") if "--job-name=train" in call]
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60" in train
    assert train.endswith(
        f"train {job.root}/run.toml --run.seed=5 --resume=auto --rollout.registry=true --rollout.num_servers=2"
    )
    assert (job.run_dir / "attempt").read_text() == "7.0\n"


def test_a_node_that_the_doctor_finds_bad_is_left_out_of_the_requeued_job(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job.root / "sitecustomize.py").write_text(
        "import sys, types, pathlib\n"
        "doctor = types.ModuleType('megatron_rpp.commands.doctor')\n"
        f"report = {json.dumps({'bad_nodes': [NODES[1]], 'only_nodes_fail': True})!r}\n"
        "doctor.run = lambda words: 1 if pathlib.Path(words[-1][7:]).write_text(report) else 0\n"
        "sys.modules[doctor.__name__] = doctor\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{job.root}{os.pathsep}{Path(cli.__file__).parents[1]}")
    assert job.start("exit 0", "--slurm.doctor=true") == 75
    assert job.calls("srun") == [], "nothing was started"
    assert job.calls("scontrol")[-2:] == ["scontrol requeue 7", f"scontrol update JobId=7 ExcNodeList={NODES[1]}"]


def test_an_array_task_has_its_index_in_its_words(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job.start("exit 1", "--run.seed=%a") == 2
    assert "%a stands for the index of an array task" in job.log()


def kill_guard(job: Job, number: int) -> None:
    """Once both have exchanged beats with the supervisor."""
    for each in (1, 2):
        wait_for(job.run_dir / f"guard-{each}")
    time.sleep(4)
    os.kill(int((job.run_dir / f"guard-{number}").read_text()), signal.SIGKILL)


def test_a_lost_node_is_replaced_by_a_new_job_without_it(job: Job) -> None:
    code = job.start("exec sleep 60", guard=GUARDS, then=lambda pid: kill_guard(job, 2))
    assert code == 75 and job.history.tries()[0].bad_nodes == [NODES[1]]
    [call] = job.calls("sbatch")
    assert "--nodes=2" in call and "--account=team" in call and "--qos" not in call
    assert call.endswith(f"--exclude={NODES[1]} {job.run_dir}/slurm/job-7.sbatch {job.root}/run.toml")
    assert "scontrol requeue 7" not in job.calls("scontrol"), "that would wait for SlurmdTimeout"


def test_a_guard_replaces_the_job_when_the_node_of_the_batch_script_is_gone(job: Job) -> None:
    def lose_batch_host(pid: int) -> None:
        kill_guard(job, 1)
        os.kill(pid, signal.SIGKILL)

    assert job.start("exec sleep 10", guard=GUARDS, then=lose_batch_host) == -signal.SIGKILL
    end = time.monotonic() + 30
    while not job.calls("scancel") and time.monotonic() < end:
        time.sleep(0.1)
    assert job.calls("scancel") == ["scancel 7"]
    assert f"--exclude={NODES[0]}" in job.calls("sbatch")[0] and len(job.calls("sbatch")) == 1
    assert job.history.tries()[0].ending == Try.LOST_NODES
