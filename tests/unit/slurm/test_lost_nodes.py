"""Nodes that fall silent, and guards that do not: who is replaced, by whom, and who is not."""

from __future__ import annotations

import os
import signal
import time

import psutil
from fake_slurm import GUARDS, NODES, TRAINING, Job

from megatron_rpp.slurm.history import Try

LONG = f"{TRAINING}; exec sleep 60"


def guards(job: Job) -> list[int]:
    """Their pids, once all have exchanged beats with the supervisor."""
    pids = [int(job.wait_for_file(f"guard-{number}")) for number in (1, 2, 3)]
    job.wait_for_file("attempt")
    time.sleep(2)
    return pids


def test_a_lost_node_is_replaced_by_a_new_job_without_it(job: Job) -> None:
    pid = 0

    def lose_it(_: int) -> None:
        nonlocal pid
        pid = guards(job)[1]
        os.kill(pid, signal.SIGSTOP)  # says nothing more, and closes nothing: as a node without power

    refuse_all = 'case "$*" in *127.0.0.9,127.0.0.2*) echo too few nodes >&2; exit 1;; esac; echo 8'
    job.history.begin("5.0", ["x"], 0)
    job.history.end("5.0", Try.LOST_NODES, "earlier", 1, ["127.0.0.9"])
    try:
        assert job.start(LONG, guard=GUARDS, sbatch=refuse_all, then=lose_it) == 75
    finally:
        os.kill(pid, signal.SIGKILL)
    assert job.history.tries()[1].bad_nodes == [NODES[1]]
    refused, accepted = job.calls("sbatch")
    assert "--exclude=127.0.0.9,127.0.0.2 " in refused and f"--exclude={NODES[1]} " in accepted
    assert "--job-name=a job" in accepted and "--account=team" in accepted and "--qos" not in accepted
    assert accepted.endswith(f"{job.run_dir}/slurm/job-7.sbatch {job.root}/run.toml")
    assert not job.calls("scontrol", "requeue"), "that would wait for SlurmdTimeout"


def test_signals_that_slurm_sends_to_all_steps_cost_no_node(job: Job) -> None:
    def signal_all(supervisor: int) -> None:
        pids = guards(job)
        for pid in pids:
            for number in (signal.SIGUSR1, signal.SIGTERM):
                os.kill(pid, number)
        os.kill(pids[1], signal.SIGKILL)  # a guard that ends is not a node that is lost
        time.sleep(5)
        assert [psutil.pid_exists(pid) for pid in pids] == [True, False, True]
        os.kill(supervisor, signal.SIGUSR1)

    assert job.start(f"trap 'exit 75' USR1; {TRAINING}; sleep 60 & wait", guard=GUARDS, then=signal_all) == 75
    assert [each.ending for each in job.history.tries()] == [Try.STOPPED] and not job.calls("sbatch")


def test_where_most_nodes_are_silent_the_batch_host_is_the_one_that_is_cut_off(job: Job) -> None:
    stopped: list[int] = []

    def lose_most(_: int) -> None:
        stopped.extend(guards(job)[1:])
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)

    try:
        assert job.start(LONG, guard=GUARDS, then=lose_most) == 1
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGKILL)
    assert not job.calls("sbatch") and not job.calls("scontrol", "requeue")
    assert "this node is cut off from the others" in job.history.tries()[0].cause


def test_a_guard_replaces_the_job_when_the_node_of_the_batch_script_is_gone(job: Job) -> None:
    def lose_batch_host(supervisor: int) -> None:
        os.kill(guards(job)[0], signal.SIGKILL)
        os.kill(supervisor, signal.SIGSTOP)  # silent, as without power
        job.wait_until(lambda: job.calls("scancel") != [], "scancel")
        os.kill(supervisor, signal.SIGKILL)

    assert job.start(LONG, guard=GUARDS, then=lose_batch_host) == -signal.SIGKILL
    assert job.calls("scancel") == ["scancel 7"]
    [call] = job.calls("sbatch")
    assert f"--exclude={NODES[0]} --comment=rpp:7.0" in call
    assert job.history.tries()[0].bad_nodes == [NODES[0]]


def test_a_supervisor_that_is_killed_is_replaced_without_blaming_its_node(job: Job) -> None:
    def kill_it(supervisor: int) -> None:
        guards(job)
        os.kill(supervisor, signal.SIGKILL)

    assert job.start(LONG, guard=GUARDS, then=kill_it) == -signal.SIGKILL
    job.wait_until(lambda: job.calls("sbatch") != [], "sbatch")
    time.sleep(3)
    [call] = job.calls("sbatch")
    assert "--exclude= " in call and not job.calls("scancel")


def test_a_guard_that_never_reached_the_supervisor_does_nothing(job: Job) -> None:
    unreachable = '"${@: -8:3}" 127.0.0.1 1 "${@: -3}"; touch $RUN_DIR/guard-has-ended; sleep 60'
    line = f"SLURMD_NODENAME={NODES[1]} " + unreachable

    def wait(supervisor: int) -> None:
        job.wait_until((job.run_dir / "guard-has-ended").exists, "the guard's end")
        os.kill(supervisor, signal.SIGUSR1)

    assert job.start(f"trap 'exit 75' USR1; {TRAINING}; sleep 60 & wait", guard=line, then=wait) == 75
    assert not job.calls("sbatch") and "cannot reach the supervisor on 127.0.0.1:1" in job.log()
