"""Real SLURM jobs that train the demo's model with real SGLang servers to the end, started as a user would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.rollout.server_command import server_command, server_environment
from tests.launch.cluster import REPOSITORY, Cluster
from tests.launch.runs import Run, shipped_script
from tests.support.processes import command_line

STEPS = 4  # of examples/cluster_cpu.toml


def test_every_task_of_an_array_trains_its_own_run(cluster: Cluster, demo: Path, tmp_path: Path) -> None:
    more = ["--parallel.pipeline=1", "--run.seed=%a"]
    words = Run.of_demo(cluster, demo, tmp_path / "run-%a", *more).words
    options = ["--array=0-1", "--nodes=1", f"--output={tmp_path}/%a.log"]
    script = shipped_script("colocated.sbatch", tmp_path)
    job = cluster.submit([*options, script, *words], env={"RPP_PYTHON": sys.executable})
    assert cluster.wait(job, timeout_s=400)["JobState"] == "COMPLETED", cluster.story(cluster.jobs(job))
    first, second = (Run(cluster, tmp_path / f"run-{index}", ()) for index in (0, 1))
    for each in (first, second):
        each.check_complete(STEPS)
        assert len(each.tries()) == 1 and len(each.tries()[0].nodes) == 1
    assert first.steps()[0]["entropy/mean"] != second.steps()[0]["entropy/mean"], "the seeds are the same"
    first.check_no_orphans(cluster.nodes)


def test_a_heterogeneous_job_that_rpp_has_submitted_trains_with_servers_on_nodes_of_their_own(
    cluster: Cluster, demo: Path, tmp_path: Path
) -> None:
    run = Run.of_demo(cluster, demo, tmp_path / "run", "--slurm.rollout_nodes=1", "--slurm.servers_per_node=2")
    rpp = [sys.executable, "-m", "megatron_rpp.cli", "launch", "slurm"]
    shown = cluster.run([*rpp, *run.words, "--nodes", "3"]).stdout
    assert "2 trainer nodes" in shown and "2 SGLang servers (TP 1) on each of 1 more nodes" in shown
    job = shown.rpartition("submitted job ")[2].partition(";")[0]
    assert cluster.wait(job, timeout_s=400)["JobState"] == "COMPLETED", cluster.story(cluster.jobs(job))
    run.check_complete(STEPS)
    assert len(run.tries()[0].nodes) == 3
    servers = sorted(path.name for path in (run.dir / "logs").glob("sglang-*.txt"))
    rollout_node = run.tries()[0].nodes[2]
    assert servers == [f"sglang-{rollout_node}-{index}.txt" for index in (0, 1)]
    assert json.loads((run.dir / "doctor.json").read_text())["ok"], "the job has trained on nodes that were not checked"
    run.check_no_orphans(cluster.nodes)


@pytest.fixture(scope="module")
def server(cluster: Cluster, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an SGLang server on the first node, which two runs share."""
    node = cluster.nodes[0]
    url = f"http://{cluster.hosts.address(node)}:30000"  # the node has its ports to itself
    rollout = RolloutConfig(context_length=16)
    command = server_command(str(demo / "init"), rollout, "float32", "cpu", 30000, host=cluster.hosts.address(node))
    argv = cluster.hosts.argv(node, command)
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with (
        log.open("wb") as out,
        subprocess.Popen(argv, env=server_environment(cluster.environment(), rollout, "cpu"), stdout=out, stderr=out),
    ):
        yield url
        for pid in cluster.pids(node):
            if psutil.pid_exists(pid) and "sglang" in " ".join(command_line(psutil.Process(pid))):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_four_ranks_train_under_mpi(cluster: Cluster, demo: Path, server: str, tmp_path: Path, launcher: str) -> None:
    layout = ["--parallel.pipeline=2", "--parallel.data=2", "--run.steps=1", f"--rollout.urls={server}"]
    run = Run.of_demo(cluster, demo, tmp_path / "run", *layout)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if launcher == "mpirun":
        argv = [REPOSITORY / "launch" / "mpi" / "mpirun.sh", "4", *run.words]
    else:
        ranks = ["srun", "--mpi=pmi2", "--nodes=2", "--ntasks=4"]
        argv = [*ranks, sys.executable, "-m", "megatron_rpp.cli", "train", *run.words]
    cluster.run(argv, on=cluster.nodes[1], timeout_s=300, env={"PATH": path})
    assert [each["step"] for each in run.steps()] == [0]
    run.check_no_orphans(cluster.nodes[1:])
