"""The variables of each launcher, read into a place in the job. Imports no torch."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rpp.config.errors import ConfigError

Environment = Mapping[str, str]

_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # the batch script, an interactive shell and the like are steps from here on


@dataclass(frozen=True)
class JobPlace:
    """One process's place in its job, as the launcher tells it."""

    rank: int
    world_size: int
    local_rank: int  # among the job's processes on this host
    local_world_size: int
    launcher: str  # rpp (our own, on one host), torchrun, slurm, mpi or single
    attempt: str  # names this start of the job, equal on all its ranks
    host: str  # of this process; under SLURM its node's name

    def __post_init__(self) -> None:
        assert 0 <= self.local_rank < self.local_world_size <= self.world_size and self.rank < self.world_size

    @property
    def has_unique_attempt(self) -> bool:
        """Whether no other start of any job has this name; else rank 0 makes it so (rendezvous.py)."""
        return self.attempt.partition(".")[0] not in ("torchrun", "mpi")


def node_name(env: Environment = os.environ) -> str:
    """This host, as the job calls it: under SLURM its node's name, which need not be what the host calls itself."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def place_by_torchrun(env: Environment) -> JobPlace | None:
    """From the variables of torchrun, which our own launcher sets, too."""
    rank_and_size = _pair(env, "RANK", "WORLD_SIZE", "unset both to start a job, or start it with torchrun")
    if rank_and_size is None:
        return None
    rank, size = rank_and_size
    # By hand they are often left out; that is right on one host, and bootstrap tells where it is not.
    local = _pair(env, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "set both") if "LOCAL_WORLD_SIZE" in env else None
    local_rank, local_size = local or (number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else rank, size)
    if local_size > size or local_rank >= size:
        raise ConfigError(
            f"LOCAL_RANK={local_rank} and LOCAL_WORLD_SIZE={local_size} must fit into WORLD_SIZE={size}; "
            "unset what an earlier launcher left"
        )
    launcher = "rpp" if "RPP_LOCAL_JOB" in env else "torchrun"
    return JobPlace(rank, size, local_rank, local_size, launcher, _ranked_attempt(env), node_name(env))


def _ranked_attempt(env: Environment) -> str:
    if "RPP_LOCAL_JOB" in env:
        return env.get("RPP_ATTEMPT") or env["RPP_LOCAL_JOB"]
    run_id = env.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's default is "none"
    name = _step_name(env) if in_step(env) else "torchrun" if run_id == "none" else run_id
    return _attempt(env, f"{name}.{env.get('TORCHELASTIC_RESTART_COUNT', '0')}")


def place_by_mpi(env: Environment) -> JobPlace | None:
    """Open MPI's variables, or those of MPICH and Intel MPI; under `srun --mpi=pmi2` the place that SLURM tells."""
    for rank_name, size_name, local_names in (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")),
        ("PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
    ):
        rank_and_size = _pair(env, rank_name, size_name, "unset both, or start the job with mpirun")
        if rank_and_size is not None:
            local = _pair(env, *local_names, "unset both, or start the job with mpirun")
            return _mpi_place(env, size_name, rank_and_size, local)
    return None


def _mpi_place(env: Environment, size_name: str, job: tuple[int, int], local: tuple[int, int] | None) -> JobPlace:
    step = place_by_slurm(env)
    if local is None and step is not None:  # `srun --mpi=pmi2`
        if job != (step.rank, step.world_size):
            raise ConfigError(
                f"PMI_RANK={job[0]} and PMI_SIZE={job[1]} must equal SLURM_PROCID={step.rank} and "
                f"SLURM_STEP_NUM_TASKS={step.world_size}: an outer mpirun left them; unset PMI_RANK and PMI_SIZE, "
                "or use srun --mpi=pmi2"
            )
        # The step says all, and MPI_Init must not run: MPICH names its shared memory by the step's number alone, so
        # that what a killed start left there makes a requeued job wait in it forever.
        return step
    if step is not None and (step.local_world_size > 1 or job[1] < step.world_size):
        raise ConfigError(  # mpirun starts one task a node with srun, so that such a step by itself is in order
            f"{size_name}={job[1]} is not the job of SLURM_STEP_NUM_TASKS={step.world_size} tasks: one of srun and "
            "mpirun has started the other; use either, mpirun in the batch script or srun --mpi=pmi2"
        )
    name = _step_name(env) if in_step(env) else "mpi"
    return JobPlace(*job, *(local or job), "mpi", _attempt(env, name), node_name(env))


def place_by_slurm(env: Environment) -> JobPlace | None:
    """A task of `srun`. The batch script has SLURM_PROCID as well, but is in no step."""
    if not in_step(env):
        return None
    advice = "the step's variables are not whole; start the ranks with srun and do not unset its variables"
    rank_and_size = _pair(env, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", advice)
    if rank_and_size is None:
        raise ConfigError(f"SLURM_STEP_ID is set without SLURM_PROCID and SLURM_STEP_NUM_TASKS: {advice}")
    node, local_rank = number(env, "SLURM_NODEID"), number(env, "SLURM_LOCALID")
    counts = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if sum(counts) != rank_and_size[1] or node >= len(counts) or local_rank >= counts[node]:
        raise ConfigError(
            f"SLURM_STEP_TASKS_PER_NODE={env.get('SLURM_STEP_TASKS_PER_NODE')} must have SLURM_STEP_NUM_TASKS="
            f"{rank_and_size[1]} tasks, one of them with SLURM_NODEID={node} and SLURM_LOCALID={local_rank}; start "
            "all ranks in one step, and the parts of a heterogeneous job with srun --het-group=0,1"
        )
    return JobPlace(*rank_and_size, local_rank, counts[node], "slurm", _attempt(env, _step_name(env)), node_name(env))


def tasks_per_node(text: str) -> list[int]:
    """[2, 2, 2, 1] for SLURM's "2(x3),1". Raises ConfigError."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={text!r} must read like 2(x3),1; start the ranks with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def in_step(env: Environment) -> bool:
    """Whether srun has started this process, and not sbatch or salloc."""
    step = env.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _FIRST_SPECIAL_STEP


def _step_name(env: Environment) -> str:
    return f"{env.get('SLURM_JOB_ID', '0')}.{env['SLURM_STEP_ID']}.{env.get('SLURM_RESTART_COUNT', '0')}"


def _attempt(env: Environment, name: str) -> str:
    """`name`, or RPP_ATTEMPT where it is set, fit to be a file's name."""
    return re.sub(r"[^\w.-]", "_", env.get("RPP_ATTEMPT") or name)


def _pair(env: Environment, rank_name: str, size_name: str, advice: str) -> tuple[int, int] | None:
    """(rank, size) from two variables; None where both are missing. ConfigError where they make no sense."""
    if rank_name not in env and size_name not in env:
        return None
    for name, other in ((rank_name, size_name), (size_name, rank_name)):
        if name not in env:
            raise ConfigError(f"{other}={env[other]} is set and {name} is not: {advice}")
    rank, size = number(env, rank_name), number(env, size_name)
    if rank >= size:
        raise ConfigError(f"{rank_name}={rank} must be below {size_name}={size}: {advice}")
    return rank, size


def number(env: Environment, name: str) -> int:
    """Raises ConfigError where the variable is none."""
    text = env.get(name, "")
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{name}={text!r} must be a number; a launcher sets it: unset it, or start the job anew")
    return int(text)
