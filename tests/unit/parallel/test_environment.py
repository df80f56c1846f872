"""Each launcher's variables, as they were seen, and each way in which they can contradict themselves."""

from __future__ import annotations

import socket

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.parallel.environment import (
    JobPlace,
    find_job,
    find_rank,
    single_place,
    speaks_for_job,
)
from megatron_rpp.parallel.launcher_variables import tasks_per_node

HERE = socket.gethostname()
BATCH = {  # what the batch script itself has
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "3,1",
    "SLURMD_NODENAME": "node3",
}
STEP = BATCH | {  # `srun --ntasks=4`, its last task
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "3,1",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURMD_NODENAME": "node4",
}
ONE_EACH = STEP | {  # `srun --ntasks-per-node=1`, on the second of two nodes
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
}
ALONE = STEP | {  # srun --pty bash
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_NODEID": "0",
}
PMI2 = STEP | {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_JOBID": "7.2"}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
TORCHRUN = {
    "RANK": "2",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "a/b",
    "TORCHELASTIC_RESTART_COUNT": "1",
}
OURS = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "RPP_LOCAL_JOB": "local.x"}
BY_HAND = {"RANK": "3", "WORLD_SIZE": "4"}

SLURM_PLACE = JobPlace(3, 4, 0, 1, "slurm", "7.2.0", "node4")
MPI_PLACE = JobPlace(2, 4, 0, 2, "mpi", "mpi", HERE)


@pytest.mark.parametrize(
    ("env", "place"),
    [
        pytest.param({}, None, id="nothing"),
        pytest.param(BATCH, None, id="the batch script of SLURM is no rank"),
        pytest.param(BATCH | {"SLURM_STEP_ID": "4294967291"}, None, id="nor where it has the batch step's number"),
        pytest.param(STEP, SLURM_PLACE, id="srun"),
        pytest.param(STEP | {"SLURM_RESTART_COUNT": "2"}, JobPlace(3, 4, 0, 1, "slurm", "7.2.2", "node4"), id="again"),
        pytest.param(STEP | {"RPP_ATTEMPT": "9"}, JobPlace(3, 4, 0, 1, "slurm", "9", "node4"), id="a name given to it"),
        pytest.param(STEP | BY_HAND, JobPlace(3, 4, 0, 1, "torchrun", "7.2.0.0", "node4"), id="srun and RANK by hand"),
        pytest.param(PMI2, SLURM_PLACE, id="srun --mpi=pmi2, without MPI_Init"),
        pytest.param(MPICH, MPI_PLACE, id="mpirun of MPICH"),
        pytest.param(OPEN_MPI, MPI_PLACE, id="mpirun of Open MPI"),
        pytest.param(
            ONE_EACH | MPICH,
            JobPlace(2, 4, 0, 2, "mpi", "7.2.0", "node4"),
            id="mpirun in a batch script, which starts its helpers with srun",
        ),
        pytest.param(TORCHRUN, JobPlace(2, 4, 0, 2, "torchrun", "a_b.1", HERE), id="torchrun"),
        pytest.param(
            ONE_EACH | TORCHRUN,
            JobPlace(2, 4, 0, 2, "torchrun", "7.2.0.1", "node4"),
            id="torchrun by srun",
        ),
        pytest.param(OURS, JobPlace(1, 4, 1, 4, "rpp", "local.x", HERE), id="our launcher"),
        pytest.param(ALONE | OURS, JobPlace(1, 4, 1, 4, "rpp", "local.x", "node4"), id="our launcher in srun --pty"),
        pytest.param(BY_HAND, JobPlace(3, 4, 3, 4, "torchrun", "torchrun.0", HERE), id="RANK and WORLD_SIZE alone"),
    ],
)
def test_a_launcher_is_found_by_its_variables(env: dict[str, str], place: JobPlace | None) -> None:
    assert find_job(env) == place


def without(env: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in env.items() if key != name}


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "RANK=0 is set and WORLD_SIZE is not: unset both to start a job"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set and RANK is not"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 must be below WORLD_SIZE=4"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK='-1' must be a number"),
        ({"RANK": "", "WORLD_SIZE": "4"}, "RANK='' must be a number"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, "LOCAL_RANK=0 and LOCAL_WORLD_SIZE=8 must fit into WORLD_SIZE=4"),
        (without(MPICH, "PMI_SIZE"), "PMI_RANK=2 is set and PMI_SIZE is not"),
        (without(STEP, "SLURM_STEP_NUM_TASKS"), "SLURM_PROCID=3 is set and SLURM_STEP_NUM_TASKS is not"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "?"}, "SLURM_STEP_TASKS_PER_NODE='?' must read like 2(x3),1"),
        (  # a part of a heterogeneous step that counts for itself
            STEP | {"SLURM_STEP_TASKS_PER_NODE": "2"},
            "SLURM_STEP_TASKS_PER_NODE=2 must have SLURM_STEP_NUM_TASKS=4 tasks, one of them with SLURM_NODEID=1",
        ),
        (  # srun --mpi=none inside of mpirun -n 1
            STEP | {"PMI_RANK": "0", "PMI_SIZE": "1"},
            "PMI_RANK=0 and PMI_SIZE=1 must equal SLURM_PROCID=3 and SLURM_STEP_NUM_TASKS=4: an outer mpirun left them",
        ),
        (  # srun -n 4 mpirun -n 4
            STEP | MPICH | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"},
            "PMI_SIZE=4 is not the job of SLURM_STEP_NUM_TASKS=4 tasks: one of srun and mpirun has started the other",
        ),
        (
            ONE_EACH | OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
            "OMPI_COMM_WORLD_SIZE=1 is not",
        ),
        (  # srun -n 4 torchrun --standalone: four jobs
            STEP | TORCHRUN | {"GROUP_WORLD_SIZE": "1"},
            "torchrun's GROUP_WORLD_SIZE=1 and slurm's rank 3 of 4 contradict",
        ),
        (
            STEP | {"RANK": "0", "WORLD_SIZE": "4"},
            "RANK=0 and WORLD_SIZE=4 and slurm's rank 3 of 4 contradict",
        ),
        (
            STEP | {"RANK": "0", "WORLD_SIZE": "1"},
            "RANK=0 and WORLD_SIZE=1 and slurm's rank 3 of 4 contradict",
        ),
        (MPICH | BY_HAND, "RANK=3 and WORLD_SIZE=4 and mpi's rank 2 of 4 contradict each other"),
        (STEP | OURS, "the local launcher's job of one host and slurm's rank 3 of 4 contradict"),
    ],
)
def test_an_environment_that_contradicts_itself_is_one_error(env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_job(env)
    assert str(caught.value).startswith(message)


def test_a_shell_in_a_one_node_allocation_starts_its_own_ranks() -> None:
    assert find_rank(4, ALONE) is None
    assert find_rank(4, ALONE | {"PMI_RANK": "0", "PMI_SIZE": "1"}) is None  # the site's default is --mpi=pmi2
    assert find_rank(1, ALONE) == find_job(ALONE) is not None
    # Were these taken for shells, the other nodes would idle, and mpirun's user think that it had started the ranks.
    for env in (ALONE | {"SLURM_JOB_NUM_NODES": "2"}, {"PMI_RANK": "0", "PMI_SIZE": "1"}, OURS):
        assert find_rank(4, env) == find_job(env) is not None


def test_names_of_starts_that_are_not_unique_are_known() -> None:
    names = {
        env["at"]: place for env in ({"at": "mpi", **MPICH}, {"at": "hand", **BY_HAND}) if (place := find_job(env))
    }
    assert not any(place.has_unique_attempt for place in names.values())
    assert all(place.has_unique_attempt for place in (SLURM_PLACE, single_place({}), find_job(OURS)) if place)
    assert single_place({"RPP_ATTEMPT": "9"}).attempt == "9"


def test_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


@pytest.mark.parametrize(
    ("env", "speaks"),
    [
        ({}, True),
        (BATCH | {"SLURM_PROCID": "3"}, True),
        (STEP, False),
        (MPICH, False),
        (OPEN_MPI, False),
        (OURS, False),
    ],
)
def test_one_rank_speaks_even_where_the_environment_makes_no_sense(env: dict[str, str], speaks: bool) -> None:
    assert speaks_for_job(env) is speaks
    assert speaks_for_job(env | {"RANK": "0"})
