"""Sections of the configuration about the job around a run; schema.py has the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Resume = Literal["no", "yes", "auto"]
"""Of `rpp train`. auto: from the newest checkpoint, or from the start where there is none."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Megatron distributed checkpoints in the run directory."""

    interval: int = 20
    """Steps between checkpoints; the last step is always saved. 0: never."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints of steps that this divides are kept as well; 0: of none."""
    background: bool = True
    """Write while training goes on; a checkpoint counts once it is whole."""
    verify: bool = True
    """Compare the checksum of every file before a run is resumed from it."""


@dataclass(frozen=True)
class WatchdogConfig:
    """A job that cannot go on ends, and says why."""

    heartbeat_deadline_s: float = 30.0
    """A rank without a heartbeat for so long is taken for dead; the job ends and names its host."""
    stall_deadline_s: float = 1800.0
    """No phase of a step may take longer than this and the deadlines that it has; all stacks are dumped then."""


@dataclass(frozen=True)
class SlurmConfig:
    """What `rpp launch slurm` asks of the cluster, and how the job that it starts goes on after a failure."""

    account: str = ""
    """Account to charge; empty: the user's default."""
    partition: str = ""
    """Partition; empty: the cluster's default."""
    qos: str = ""
    """Quality of service; empty: the default."""
    time: str = "04:00:00"
    """Time limit of one try, as sbatch writes it; the job is requeued until the run is complete."""
    gpus_per_node: int = 0
    """GPUs asked for on each node; 0: none."""
    servers_per_node: int = 1
    """SGLang servers on each node that has any, each with rollout.server_tensor ranks."""
    rollout_nodes: int = 0
    """Nodes for servers alone, as the second part of a heterogeneous job; 0: they share the trainer's nodes."""
    checkpoint_before_end_s: int = 300
    """Seconds before the time limit at which the run is told to save and requeue; above the longest step."""
    doctor: bool = True
    """Check every node before each try (`rpp doctor`); a bad one is left out, and the job requeued."""
    max_tries: int = 3
    """Tries in a row that may fail without finishing a step; then the job is given up."""
    container: str = ""
    """Container image that everything runs in; empty: none."""
    container_runtime: str = "pyxis"
    """pyxis (srun --container-image) or apptainer."""
    container_mounts: tuple[str, ...] = ()
    """HOST:CONTAINER pairs mounted into the container; the run, model and data folders must be among them."""
    setup: str = ""
    """Shell line that each job runs first, such as `module load cuda`."""
    sbatch_args: tuple[str, ...] = ()
    """More arguments for sbatch, as on its command line."""
