"""Real SLURM jobs that train the demo's model with real SGLang servers to the end, started as a user would."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.launch.cluster import REPOSITORY, Cluster
from tests.launch.runs import Run, shipped_script

STEPS = 4  # of examples/cluster_cpu.toml


def test_the_shipped_script_trains_an_array_of_two_node_jobs(cluster: Cluster, demo: Path, tmp_path: Path) -> None:
    script = shipped_script("colocated.sbatch", tmp_path)
    run = Run.of_demo(cluster, demo, tmp_path / "run-%a", "--run.seed=%a", "--slurm.doctor=false")
    environment = {"RPP_PYTHON": sys.executable}
    job = cluster.submit(["--array=0-1", f"--output={tmp_path}/%a.log", script, *run.words], env=environment)
    assert cluster.wait(job, timeout_s=400)["JobState"] == "COMPLETED", cluster.story(cluster.jobs(job))
    first, second = (Run(cluster, tmp_path / f"run-{index}", ()) for index in (0, 1))
    for each in (first, second):
        each.check_complete(STEPS)
        assert len(each.tries()) == 1 and len(set(each.tries()[0].nodes)) == 2
    assert first.steps()[0]["reward/mean"] != second.steps()[0]["reward/mean"], "the seeds are the same"
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
    assert "rpp doctor" not in run.story() or (run.dir / "doctor.json").is_file()
    run.check_no_orphans(cluster.nodes)


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_four_ranks_train_under_mpi(cluster: Cluster, demo: Path, tmp_path: Path, launcher: str) -> None:
    layout = ["--parallel.pipeline=2", "--parallel.data=2", "--run.steps=2"]
    run = Run.of_demo(cluster, demo, tmp_path / "run", *layout)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if launcher == "mpirun":
        argv = [REPOSITORY / "launch" / "mpi" / "mpirun.sh", "4", *run.words]
    else:
        ranks = ["srun", "--mpi=pmi2", "--nodes=1", "--ntasks=4"]
        argv = [*ranks, sys.executable, "-m", "mpi4py", "-m", "megatron_rpp.cli", "train", *run.words]
    cluster.run(argv, on=cluster.nodes[0], timeout_s=300, env={"PATH": path})
    assert [each["step"] for each in run.steps()] == [0, 1]
    run.check_no_orphans(cluster.nodes)
