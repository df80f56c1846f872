"""What the supervisor makes of each ending, with stand-ins for SLURM's commands; tests/launch has the real ones."""

from __future__ import annotations

import json
import os
import signal
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from fake_slurm import NODES, TRAINING, Job, metrics

from megatron_rpp import cli
from megatron_rpp.slurm.history import Try

SAVED = "mkdir -p $RUN_DIR/checkpoints/step-000003"
SLEEPS_UNTIL_USR1 = f"trap 'kill $!; exit 75' USR1; {TRAINING}; sleep 60 & wait"


def test_a_complete_run_ends_with_0_and_is_not_requeued(job: Job) -> None:
    assert job.start(f"{metrics(3)}; {SAVED}; exit 0", "--run.seed=5") == 0
    assert [each.ending for each in job.history.tries()] == [Try.DONE]
    assert not job.calls("scontrol", "requeue") and not job.calls("sbatch")
    [train] = job.calls("srun", "--job-name=train")
    assert "--nodes=3 --ntasks=3 --ntasks-per-node=1" in train and "--kill-on-bad-exit=0 --wait=60" in train
    users = f"{job.root}/run.toml --run.seed=5"
    assert train.endswith(f"train {users} --resume=auto --rollout.registry=true --rollout.num_servers=3")


@pytest.mark.parametrize("left", [f"{metrics(2)}; {SAVED}", metrics(3)])
def test_exit_code_0_of_srun_is_not_believed_where_steps_or_the_last_checkpoint_are_missing(
    job: Job, left: str
) -> None:
    assert job.start(f"{left}; exit 0") == 75
    assert job.history.tries()[0].ending == Try.FAILED and job.calls("scontrol", "requeue 7")


@pytest.mark.parametrize("code", [2, 76])
def test_a_users_mistake_and_a_lost_run_directory_are_final(job: Job, code: int) -> None:
    assert job.start(f"exit {code}") == {2: 2, 76: 1}[code]
    assert not job.calls("scontrol", "requeue") and not job.calls("sbatch")


def test_what_looks_like_a_users_mistake_is_tried_again_where_the_run_has_steps(job: Job) -> None:
    assert [job.start(f"{metrics(1)}; exit 1"), job.start("exit 2")] == [75, 75]


def test_a_job_that_gets_no_further_is_given_up_after_max_tries(job: Job) -> None:
    assert [job.start(f"{metrics(steps)}; exit 1") for steps in (2, 1, 2)] == [75, 75, 1]
    assert len(job.calls("scontrol", "requeue 7")) == 2
    assert "given up: 2 tries in a row have finished no step (slurm.max_tries=2)" in job.log()


def test_a_job_that_was_cancelled_is_not_requeued(job: Job) -> None:
    assert job.start("exit 75", state="CANCELLED") == 75
    assert not job.calls("scontrol", "requeue")


def test_usr1_reaches_the_trainer_and_the_job_is_requeued(job: Job) -> None:
    def signal_it(pid: int) -> None:
        job.wait_for_file("attempt")
        os.kill(pid, signal.SIGUSR1)

    assert job.start(SLEEPS_UNTIL_USR1, then=signal_it) == 75
    assert [each.cause for each in job.history.tries()] == ["stopped at a safe point"]
    assert job.calls("scontrol", "requeue 7")


def test_usr1_before_all_ranks_are_there_does_not_reach_them(job: Job) -> None:
    def signal_it(pid: int) -> None:
        job.wait_until(lambda: (job.root / "calls").exists() and job.calls("srun", "--job-name=train") != [], "srun")
        os.kill(pid, signal.SIGUSR1)

    assert job.start("trap 'echo > $RUN_DIR/hit' USR1; sleep 60 & wait", then=signal_it) == 75
    assert [each.ending for each in job.history.tries()] == [Try.STOPPED] and job.calls("scontrol", "requeue 7")
    assert not (job.run_dir / "hit").exists(), "the signal would end a rank that is still importing"


def test_a_step_that_is_longer_than_the_time_left_is_cut_short_and_the_job_requeued(job: Job) -> None:
    def signal_it(pid: int) -> None:
        job.wait_for_file("attempt")
        os.kill(pid, signal.SIGUSR1)

    end = (datetime.now() + timedelta(seconds=58)).isoformat(timespec="seconds")
    assert job.start(f"trap '' USR1; {TRAINING}; exec sleep 60", env={"FAKE_END": end}, then=signal_it) == 75
    assert "slurm.checkpoint_before_end_s=300 must be above the longest step" in job.history.tries()[0].cause
    assert job.calls("scontrol", "requeue 7")


def test_the_cause_that_a_rank_reported_comes_first(job: Job) -> None:
    report = {"rank": 1, "host": "b", "kind": "error", "message": "no more memory", "lost_hosts": [], "time": 1.0}
    text = json.dumps({"by": {"rank": 1, "host": "b"}, **report})
    folder = "$RUN_DIR/failures/7.$SLURM_RESTART_COUNT"
    job.start(f"mkdir -p {folder}; echo '{text}' > {folder}/rank-1.json; exit 1")
    assert (job.history.tries()[0].cause, job.history.tries()[0].host) == ("rank 1 on b: no more memory", "b")
    assert "rpp slurm-job: rank 1 on b: no more memory" in job.log()


def test_a_task_of_an_array_requeues_itself_alone(job: Job) -> None:
    # The last task's job id is also the array's.
    env = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    assert job.start("exit 1", "--run.seed=%a", env=env) == 75
    assert job.calls("scontrol", "requeue") == ["scontrol requeue 7_1"]
    assert "--run.seed=1" in job.calls("srun", "--job-name=train")[0]
    assert job.start("exit 1", "--run.seed=%a") == 2
    assert "%a stands for the index of an array task" in job.log()


def test_two_jobs_cannot_run_in_one_folder(job: Job) -> None:
    job.history.begin("6.0", ["x"], 0)
    assert job.start("exit 0") == 2
    assert "is in use by job 6; choose another --run.dir" in job.log() and not job.calls("srun")
    assert job.start("exit 1", "--slurm.max_tries=9", state="COMPLETED") == 75, "the other has ended without a word"


def test_a_node_that_the_doctor_finds_bad_is_left_out_of_the_requeued_job(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"bad_nodes": [NODES[1]], "only_nodes_fail": True, "nodes": NODES}
    (job.root / "sitecustomize.py").write_text(
        "import sys, types, pathlib\n"
        "doctor = types.ModuleType('megatron_rpp.commands.doctor')\n"
        f"report = {json.dumps(found)!r}\n"
        "doctor.run = lambda words: 1 if pathlib.Path(words[-1][7:]).write_text(report) else 0\n"
        "sys.modules[doctor.__name__] = doctor\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{job.root}{os.pathsep}{Path(cli.__file__).parents[1]}")
    assert job.start("exit 0", "--slurm.doctor=true") == 75
    assert job.calls("srun") == [], "nothing was started"
    assert job.calls("scontrol")[-2:] == ["scontrol requeue 7", f"scontrol update JobId=7 ExcNodeList={NODES[1]}"]
