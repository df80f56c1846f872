"""What goes wrong on a cluster, in two jobs that must come to their end all the same."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_rpp.slurm.history import Try
from tests.launch.cluster import Cluster
from tests.launch.runs import Run, shipped_script

HEARTBEAT_S = 12.0  # two busy cores must not look like a dead node


def start(run: Run, script: Path) -> str:
    return run.cluster.submit([f"--output={run.dir}.log", script, *run.words], env={"RPP_PYTHON": sys.executable})


def oldest(cluster: Cluster, node: str, *words: str) -> psutil.Process:
    """Of the processes on `node` with all of `words` on their command lines: the others are its children."""
    found = []
    for pid in cluster.pids(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if set(words) <= set(process.cmdline()):
                found.append(process)
    return min(found, key=lambda process: process.create_time())


@pytest.fixture
def faulty(cluster: Cluster, demo: Path, tmp_path: Path) -> Run:
    more = [f"--watchdog.heartbeat_deadline_s={HEARTBEAT_S}", "--slurm.doctor=false", "--checkpoint.interval=1"]
    return Run.of_demo(cluster, demo, tmp_path / "run", *more)


def test_a_job_survives_a_killed_server_a_killed_rank_and_its_time_limit(
    cluster: Cluster, faulty: Run, tmp_path: Path
) -> None:
    run = Run(cluster, faulty.dir, (*faulty.words, "--run.steps=9"))
    job = start(run, shipped_script("colocated.sbatch", tmp_path))
    run.wait_for_step(1)
    _, other = run.tries()[0].nodes
    os.killpg(os.getpgid(oldest(cluster, other, "sglang.launch_server").pid), signal.SIGKILL)
    run.wait_for_step(len(run.steps()) + 1)
    assert len(run.tries()) == 1, "a dead server has ended the job"
    oldest(cluster, other, "megatron_rpp.cli", "train").kill()
    run.wait_until(lambda: len(run.tries()) == 2, "the requeued job")
    failed = run.tries()[0]
    assert failed.ending == Try.FAILED and f"on {other}" in failed.cause
    assert cluster.job(job)["Restarts"] == "1", "the same job goes on: no node is dead"
    run.wait_for_step(failed.last_step)
    cluster.run(["scancel", "--batch", "--signal=USR1", job])  # what SLURM sends before the time limit
    run.wait_until(lambda: len(run.tries()) == 3, "the requeued job")
    assert run.tries()[1].ending == Try.STOPPED
    assert cluster.wait(job, timeout_s=400)["JobState"] == "COMPLETED", run.story()
    run.check_complete(9)
    run.check_no_orphans(cluster.nodes)


def test_a_job_survives_the_death_of_its_batch_host_and_a_network_partition(
    cluster: Cluster, faulty: Run, tmp_path: Path
) -> None:
    run = Run(cluster, faulty.dir, (*faulty.words, "--run.steps=6"))
    start(run, shipped_script("disaggregated.sbatch", tmp_path))
    run.wait_for_step(1)
    dead = run.tries()[0].nodes[0]
    cluster.kill_node(dead)
    try:
        run.wait_until(lambda: len(run.tries()) == 2, "the job that replaces the one with the dead node")
        assert dead not in run.tries()[1].nodes and run.tries()[0].bad_nodes == [dead]
        run.wait_for_step(run.tries()[1].first_step)
        with cut_off(cluster, run.tries()[1].nodes[1]) as lost:
            run.wait_until(lambda: len(run.tries()) == 3, "the job that replaces the one that was cut in two")
            last = run.tries()[2]
            assert not {dead, lost} & set(last.nodes)
            assert cluster.wait(last.attempt.partition(".")[0], timeout_s=400)["JobState"] == "COMPLETED", run.story()
            run.check_complete(6)
            run.check_no_orphans([lost], limit_s=150)  # it cannot be told that the job has ended, and finds out
    finally:
        cluster.start_node(dead)


@contextlib.contextmanager
def cut_off(cluster: Cluster, node: str) -> Iterator[str]:
    cluster.cut(node)
    try:
        yield node
    finally:
        cluster.mend(node)
