"""The start of every srun line."""

from __future__ import annotations

from megatron_rpp.config.schema import SlurmConfig


def srun(name: str, nodes: int, tasks_per_node: int, *options: str) -> list[str]:
    """A step of `nodes` nodes beside others.

    --ntasks always: a step would inherit the job's. --overlap: steps share nodes and GPUs. --mpi=none: whatever the
    site's default, ranks read SLURM's variables, and nothing waits for MPI_Init.
    """
    line = ["srun", "--overlap", "--mpi=none", f"--job-name={name}", *options]
    return [*line, f"--nodes={nodes}", f"--ntasks={nodes * tasks_per_node}", f"--ntasks-per-node={tasks_per_node}"]


def container_prefix(slurm: SlurmConfig) -> list[str]:
    """What stands between srun's options and the command that it runs: options of pyxis, or apptainer's own line."""
    if not slurm.container:
        return []
    if slurm.container_runtime == "pyxis":
        mounts = [f"--container-mounts={','.join(slurm.container_mounts)}"] if slurm.container_mounts else []
        return [f"--container-image={slurm.container}", *mounts]
    binds = [word for mount in slurm.container_mounts for word in ("--bind", mount)]
    gpus = ["--nv"] if slurm.gpus_per_node else []
    return ["apptainer", "exec", *gpus, *binds, slurm.container]
