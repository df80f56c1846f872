"""Where the probes run: on every node of this SLURM job, or on this host."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import megatron_rpp
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.schema import SlurmConfig
from megatron_rpp.parallel.environment import node_name
from megatron_rpp.slurm.client import hostnames
from megatron_rpp.slurm.srun import container_prefix, srun

_PROBE = ("-m", "megatron_rpp.doctor.probe")
# Of the job's request, where it was made by the task: the one probe of a node would see one of its GPUs.
_PER_TASK = ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_NTASKS_PER_GPU")


@dataclass(frozen=True)
class Group:
    """Nodes that one command starts probes on: a part of a heterogeneous job, or the whole job."""

    nodes: tuple[str, ...]
    options: tuple[str, ...] = ()  # of srun
    is_slurm: bool = True

    def command(self, nodes: Sequence[str], slurm: SlurmConfig) -> list[str]:
        """What starts one probe on each of `nodes`, which are some or all of the group's."""
        folder = os.getcwd()
        if not self.is_slurm:
            return [sys.executable, *_PROBE, folder]
        python = "python3" if slurm.container else sys.executable
        options = [*self.options, f"--nodelist={','.join(nodes)}", "--kill-on-bad-exit=0", f"--chdir={folder}"]
        return [*srun("doctor", len(nodes), 1, *options), *container_prefix(slurm), python, *_PROBE, folder]


@dataclass(frozen=True)
class Places:
    """The nodes of a job by what they do."""

    groups: tuple[Group, ...]
    trainer_nodes: tuple[str, ...]
    rollout_nodes: tuple[str, ...]  # the same where servers share the trainer's nodes
    job_id: str = ""  # empty: not in a SLURM job

    @property
    def nodes(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys(self.trainer_nodes + self.rollout_nodes))


def find_places(env: Mapping[str, str] = os.environ) -> Places:
    """By SLURM's variables. Raises ConfigError in one of several tasks of a step."""
    if "SLURM_JOB_ID" not in env or "SLURM_JOB_NODELIST" not in env:
        here = (node_name(env),)
        return Places((Group(here, is_slurm=False),), here, here)
    if int(env.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        raise ConfigError("`rpp doctor` starts on every node itself; run it once in the job, without srun")
    parts = [env.get(f"SLURM_JOB_NODELIST_HET_GROUP_{i}") for i in (0, 1)]
    if parts[0] and parts[1]:
        trainer, rollout = hostnames(parts[0]), hostnames(parts[1])
        # Not one step over both: each part of such a step takes a share of the questions on standard input.
        groups = (Group(trainer, ("--het-group=0",)), Group(rollout, ("--het-group=1",)))
        return Places(groups, trainer, rollout, env["SLURM_JOB_ID"])
    nodes = hostnames(env["SLURM_JOB_NODELIST"])
    return Places((Group(nodes),), nodes, nodes, env["SLURM_JOB_ID"])


def probe_environment(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`env`, with this package found from any folder, and a node's GPUs whole."""
    home = str(Path(megatron_rpp.__file__).parent.parent)
    kept = {name: value for name, value in env.items() if name not in _PER_TASK}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, [home, env.get("PYTHONPATH", "")]))}
