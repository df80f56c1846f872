"""What the launcher of this process says of its place in the job. Imports no torch.

Known launchers, innermost first: our own on one host, torchrun (or its variables, set by hand), mpirun, and `srun`
(with any --mpi). One may start another on every host; two that contradict each other are an error.
"""

from __future__ import annotations

import os
from dataclasses import replace

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.parallel.launcher_variables import (
    Environment,
    JobPlace,
    in_step,
    node_name,
    number,
    place_by_mpi,
    place_by_slurm,
    place_by_torchrun,
)

__all__ = ["JobPlace", "find_job", "find_rank", "node_name", "single_place", "speaks_for_job"]


def find_job(env: Environment = os.environ) -> JobPlace | None:
    """This process's place in a launcher's job; None where no launcher started it. Raises ConfigError."""
    outer = place_by_mpi(env) or place_by_slurm(env)
    inner = place_by_torchrun(env)
    if inner is None:
        return outer
    if outer is not None:
        _check_nested(env, inner, outer)
        if "LOCAL_WORLD_SIZE" not in env and inner.world_size == outer.world_size:  # RANK was set by hand
            return replace(inner, local_rank=outer.local_rank, local_world_size=outer.local_world_size)
    return inner


def find_rank(num_ranks: int, env: Environment = os.environ) -> JobPlace | None:
    """`find_job`, but None too where this process is the only task on a one-node allocation (`srun --pty bash`).

    There the launching command starts the job's `num_ranks` ranks itself. Raises ConfigError.
    """
    place = find_job(env)
    is_alone = place is not None and place.world_size == 1 and place.launcher in ("slurm", "mpi")
    if is_alone and num_ranks > 1 and in_step(env) and env.get("SLURM_JOB_NUM_NODES") == "1":
        return None
    return place


def single_place(env: Environment = os.environ) -> JobPlace:
    """The place of a process that is a job of its own."""
    return JobPlace(0, 1, 0, 1, "single", env.get("RPP_ATTEMPT") or f"single.{os.getpid()}", node_name(env))


def speaks_for_job(env: Environment = os.environ) -> bool:
    """Whether this process is rank 0, for messages; a guess where the environment contradicts itself."""
    names = ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", *(["SLURM_PROCID"] if in_step(env) else [])]
    return next((env[name] for name in names if name in env), "0") == "0"


def _check_nested(env: Environment, inner: JobPlace, outer: JobPlace) -> None:
    """A launcher inside another must be the only one of its host, and know of the others."""
    if inner.launcher == "rpp":
        agrees, says = outer.world_size == 1, "the local launcher's job of one host"
    elif "GROUP_WORLD_SIZE" in env:  # of torchrun: how many of it there are
        agrees = number(env, "GROUP_WORLD_SIZE") == outer.world_size
        says = f"torchrun's GROUP_WORLD_SIZE={env['GROUP_WORLD_SIZE']}"
    else:
        agrees = outer.world_size == 1 or (inner.rank, inner.world_size) == (outer.rank, outer.world_size)
        says = f"RANK={inner.rank} and WORLD_SIZE={inner.world_size}"
    if not agrees:
        raise ConfigError(
            f"{says} and {outer.launcher}'s rank {outer.rank} of {outer.world_size} contradict each other: unset RANK, "
            "WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, or start one launcher on each node (--ntasks-per-node=1 "
            "and torchrun --nnodes)"
        )
