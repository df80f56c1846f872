"""Launchers that span hosts, for real: three jobs at once on the same two nodes; and what each must refuse.

`srun --mpi=pmi2` over two nodes is in test_jobs.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.cluster import REPOSITORY, Cluster

PYTHON = sys.executable
MPIRUN, TORCHRUN = (str(Path(PYTHON).parent / name) for name in ("mpirun", "torchrun"))
NODES = ["--nodes=2", "--nodelist=node1,node2"]
FIND = (
    "import sys\n"
    "from megatron_rpp.parallel.environment import find_job\n"
    "try: print(find_job())\n"
    "except ValueError as error: sys.exit(f'refused: {error}')\n"
)

Saw = list[dict[str, Any]]  # by rank


def worker(out: Path, layout: str, *before: str) -> str:
    """One rank's command line; layout: TENSOR PIPELINE DATA."""
    return shlex.join([PYTHON, *before, "-m", "tests.launch.bootstrap_worker", str(out), f"{out}/run", *layout.split()])


def commands(out: Path) -> dict[str, tuple[list[str], str]]:
    """{launcher: (sbatch's options, the batch script's line)}."""
    rendezvous = '--rdzv-backend c10d --rdzv-endpoint "$(hostname)":29511 --rdzv-id "$SLURM_JOB_ID"'
    torchrun = worker(out / "torchrun", "1 2 1").removeprefix(shlex.quote(PYTHON))
    return {
        "srun": (["--ntasks-per-node=2"], f"srun --ntasks=4 {worker(out / 'srun', '2 2 1')}"),
        "mpirun": (["--ntasks-per-node=2"], f"{MPIRUN} -n 3 {worker(out / 'mpirun', '1 1 3', '-m', 'mpi4py')}"),
        "torchrun": (["--ntasks-per-node=1"], f"srun --ntasks=2 {TORCHRUN} --nnodes 2 {rendezvous} {torchrun}"),
    }


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bootstrap")


@pytest.fixture(scope="module")
def saw(cluster: Cluster, out: Path) -> dict[str, Saw]:
    """What the ranks of each launcher's job saw."""
    jobs = {}
    for name, (options, line) in commands(out).items():
        (out / name).mkdir()
        jobs[name] = cluster.submit([*NODES, *options, f"--output={out}/{name}/log", "--wrap", line])
    for name, job in jobs.items():
        ended = cluster.wait(job, timeout_s=300)
        assert ended["JobState"] == "COMPLETED", (out / name / "log").read_text()
    return {name: _read(out / name) for name in jobs}


def _read(folder: Path) -> Saw:
    files = sorted(folder.glob("*.json"), key=lambda path: int(path.stem))
    return [json.loads(path.read_text()) for path in files]


@pytest.mark.parametrize(
    ("name", "launcher", "hosts", "local"),
    [
        ("srun", "slurm", ["node1", "node1", "node2", "node2"], [[0, 2], [1, 2], [0, 2], [1, 2]]),
        ("mpirun", "mpi", ["node1", "node1", "node2"], [[0, 2], [1, 2], [0, 1]]),
        ("torchrun", "torchrun", ["node1", "node2"], [[0, 1], [0, 1]]),
    ],
)
def test_ranks_on_two_nodes_make_one_job(
    saw: dict[str, Saw], name: str, launcher: str, hosts: list[str], local: list[list[int]]
) -> None:
    ranks = saw[name]
    assert [rank["host"] for rank in ranks] == hosts
    assert [rank["local"] for rank in ranks] == local
    size = len(hosts)
    assert all(rank["launcher"] == launcher for rank in ranks)
    assert all(rank["sum"] == size * (size + 1) / 2 for rank in ranks)  # a collective, over gloo
    assert all(rank["told"] == list(range(size)) for rank in ranks)  # the store, where other jobs are on these nodes
    assert all((rank["interface"], rank["nccl"]) == ("eth0", "=eth0") for rank in ranks)


def test_the_grid_is_megatrons(saw: dict[str, Saw]) -> None:
    assert [rank["grid"] for rank in saw["srun"]] == [[0, 0], [1, 0], [0, 1], [1, 1]]  # TP2 x PP2


def test_mpi_is_used_only_where_mpi_started_the_ranks(saw: dict[str, Saw]) -> None:
    assert {name: [rank["mpi"] for rank in ranks] for name, ranks in saw.items()} == {
        "srun": [False] * 4,
        "mpirun": [True] * 3,
        "torchrun": [False] * 2,
    }


def test_others_find_a_running_job_in_its_run_directory(saw: dict[str, Saw]) -> None:
    for ranks in saw.values():
        (attempt,) = {rank["attempt"] for rank in ranks}
        assert all(rank["published"] == [attempt, "node1", "10.77.0.2", len(ranks)] for rank in ranks)
    attempts = [ranks[0]["attempt"] for ranks in saw.values()]
    assert len(set(attempts)) == len(attempts)


def test_a_job_that_has_ended_is_not_found(saw: dict[str, Saw], out: Path) -> None:
    assert not any(list((out / name / "run" / "rendezvous").iterdir()) for name in saw)


def test_srun_inside_of_mpirun_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    find = shlex.join([PYTHON, "-c", FIND])
    line = f"{MPIRUN} -launcher fork -n 1 srun --mpi=none --ntasks=2 {find}"
    job = cluster.submit(["--nodes=1", "--ntasks=2", f"--output={tmp_path}/log", "--wrap", line])
    assert cluster.wait(job)["JobState"] == "FAILED"
    told = [each for each in (tmp_path / "log").read_text().splitlines() if each.startswith("refused: ")]
    assert told == ["refused: PMI_SIZE=1 is not the job of SLURM_STEP_NUM_TASKS=2 tasks: one of srun and mpirun has "
                    "started the other; use either, mpirun in the batch script or srun --mpi=pmi2"] * 2  # fmt: skip


def test_a_batch_script_is_no_rank(cluster: Cluster, tmp_path: Path) -> None:
    find = shlex.join([PYTHON, "-c", FIND])
    job = cluster.submit(["--nodes=2", "--ntasks=4", f"--output={tmp_path}/log", "--wrap", find])
    assert cluster.wait(job)["JobState"] == "COMPLETED"
    assert (tmp_path / "log").read_text() == "None\n"


def test_a_host_whose_name_nobody_knows_is_named_on_every_rank(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    forget = f'mount --bind {tmp_path}/hosts /etc/hosts && exec "$@"'
    inner = ["unshare", "-m", "bash", "-c", forget, "_", *shlex.split(worker(tmp_path, "1 1 2"))]
    line = f"srun --ntasks=2 {shlex.join(inner)}"
    job = cluster.submit([*NODES, "--ntasks-per-node=1", f"--output={tmp_path}/log", "--wrap", line])
    assert cluster.wait(job, timeout_s=120)["JobState"] == "FAILED"
    text = (tmp_path / "log").read_text()
    told = [line for line in text.splitlines() if line.startswith("host node1: the name node1 does not resolve")]
    assert len(told) == 2, text
    assert all("add node1 with its address to DNS or /etc/hosts, or set GLOO_SOCKET_IFNAME" in line for line in told)


def test_mpiruns_script_tells_a_mistake_once(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(f'[run]\ndir = "{tmp_path}/run"\n')
    argv = ["launch/mpi/mpirun.sh", "2", str(tmp_path / "run.toml"), "--parallel.data=3"]
    path = {"PATH": f"{Path(PYTHON).parent}:/usr/bin:/bin"}
    done = subprocess.run(argv, cwd=REPOSITORY, env=path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if line.startswith("rpp: error")]
    assert len(told) == 1 and told[0].endswith("must equal the number of ranks in the job, 2")
