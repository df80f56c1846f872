"""The nodes of this job, and how a configuration spreads over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.layout_words import by_keys
from megatron_rpp.config.schema import Config
from megatron_rpp.parallel.launcher_variables import in_step
from megatron_rpp.slurm.client import hostnames


@dataclass(frozen=True)
class Allocation:
    """What SLURM gave to this start of the job."""

    job_id: str
    job: str  # as SLURM's commands must be told: ARRAYJOB_TASK for a task of an array, which may be named by job_id too
    restart: int  # how often SLURM has requeued it
    trainer_nodes: tuple[str, ...]
    rollout_nodes: tuple[str, ...]  # the same where servers share the trainer's nodes

    @property
    def batch_host(self) -> str:
        """Where the batch script runs."""
        return self.trainer_nodes[0]

    @property
    def is_split(self) -> bool:
        """A heterogeneous job: servers have nodes of their own."""
        return self.trainer_nodes != self.rollout_nodes

    @property
    def attempt(self) -> str:
        """Names this start of the job; steps get it as RPP_ATTEMPT."""
        return f"{self.job_id}.{self.restart}"

    @property
    def nodes(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys(self.trainer_nodes + self.rollout_nodes))

    @classmethod
    def of_this_job(cls, env: Mapping[str, str]) -> Allocation:
        """From the variables of a batch script. Raises ConfigError outside of one."""
        if "SLURM_JOB_ID" not in env or in_step(env):
            raise ConfigError("`rpp slurm-job` is what a batch script runs; to submit one, write: rpp launch slurm")
        array = env.get("SLURM_ARRAY_JOB_ID")
        trainer = hostnames(env.get("SLURM_JOB_NODELIST_HET_GROUP_0") or env["SLURM_JOB_NODELIST"])
        rollout = env.get("SLURM_JOB_NODELIST_HET_GROUP_1")
        return cls(
            job_id=env["SLURM_JOB_ID"],
            job=f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"],
            restart=int(env.get("SLURM_RESTART_COUNT") or 0),
            trainer_nodes=trainer,
            rollout_nodes=hostnames(rollout) if rollout else trainer,
        )


def ranks_per_node(config: Config, nodes: int) -> int:
    """Trainer ranks on each of `nodes` nodes. Raises ConfigError where they do not divide, or have too few GPUs."""
    parallel, world = config.parallel, config.parallel.world_size
    if world % nodes:
        raise ConfigError(f"{nodes} trainer nodes must divide the {world} ranks of {by_keys(parallel)}")
    ranks, gpus = world // nodes, config.slurm.gpus_per_node
    if gpus and ranks > gpus:
        raise ConfigError(
            f"{world} ranks on {nodes} nodes are {ranks} a node, more than slurm.gpus_per_node={gpus}; "
            f"ask for {-(-world // gpus)} trainer nodes"
        )
    if ranks % parallel.tensor and parallel.tensor > 1 and nodes > 1:
        raise ConfigError(
            f"parallel.tensor={parallel.tensor} must divide the {ranks} ranks of a node: "
            "tensor parallelism across nodes is too slow"
        )
    check_server_gpus(config)
    return ranks


def check_server_gpus(config: Config) -> None:
    """The servers of a node have GPUs enough. Raises ConfigError."""
    slurm, tensor = config.slurm, config.rollout.server_tensor
    if slurm.gpus_per_node and slurm.servers_per_node * tensor > slurm.gpus_per_node:
        raise ConfigError(
            f"slurm.servers_per_node={slurm.servers_per_node} x rollout.server_tensor={tensor} must be at most "
            f"slurm.gpus_per_node={slurm.gpus_per_node}"
        )
