"""The command lines of a job's steps: servers, trainer, and a guard on every node."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rpp.config.schema import Config, SlurmConfig
from megatron_rpp.slurm.allocation import Allocation, ranks_per_node

REGISTRY = "--rollout.registry=true"
"""The job's servers are those of its own step."""


@dataclass(frozen=True)
class Steps:
    """Pure: the same configuration and allocation give the same lines."""

    config: Config
    allocation: Allocation
    words: tuple[str, ...]  # configuration files and overrides, as the user gave them

    def serve(self) -> list[str]:
        """One task a server. It outlives its tasks and nodes: a dead server does not end the job."""
        nodes, each = self.allocation.rollout_nodes, self.config.slurm.servers_per_node
        group = 1 if self.allocation.is_split else None
        options = ["--kill-on-bad-exit=0", "--no-kill", f"--output={self.config.run.dir}/logs/serve-%t.txt"]
        return [
            *self._srun("serve", nodes, each, group, options),
            *self._rpp("serve", *self.words, "--rollout.registry=true"),
        ]

    def train(self) -> list[str]:
        """One task a rank. Where one fails the others' watchdogs end them, and say which it was; `--wait` sees to it.

        (`--kill-on-bad-exit=1` would end them before they can tell.)
        """
        nodes = self.allocation.trainer_nodes
        group = 0 if self.allocation.is_split else None
        limit_s = math.ceil(max(60.0, 4 * self.config.watchdog.heartbeat_deadline_s))
        options = ["--kill-on-bad-exit=0", f"--wait={limit_s}"]
        srun = self._srun("train", nodes, ranks_per_node(self.config, len(nodes)), group, options)
        servers = len(self.allocation.rollout_nodes) * self.config.slurm.servers_per_node
        words = [*self.words, "--resume=auto", REGISTRY, f"--rollout.num_servers={servers}"]
        return [*srun, *self._rpp("train", *words)]

    def guard(self, host: str, port: int) -> list[str]:
        """One task a node, outside of any container: it may have to call SLURM's commands."""
        group = "0,1" if self.allocation.is_split else None
        options = ["--kill-on-bad-exit=0", "--no-kill"]
        if self.allocation.is_split:  # one rank space over both parts; SLURM spreads it by their nodes
            srun = ["srun", "--overlap", "--mpi=none", "--job-name=guard", f"--het-group={group}", *options]
            srun.append("--ntasks-per-node=1")
        else:
            srun = self._srun("guard", self.allocation.nodes, 1, None, options)
        heartbeat = f"{self.config.watchdog.heartbeat_deadline_s:g}"
        module = [sys.executable, "-m", "megatron_rpp.slurm.guard"]
        return [*srun, *module, host, str(port), heartbeat, self.config.run.dir, self.allocation.attempt]

    def _srun(
        self, name: str, nodes: Sequence[str], tasks: int, group: int | None, options: Sequence[str]
    ) -> list[str]:
        # --ntasks always: a step would inherit the job's. --overlap: steps share nodes and GPUs.
        # --mpi=none: whatever the site's default, ranks read SLURM's variables.
        count = len(nodes)
        srun = ["srun", "--overlap", "--mpi=none", f"--job-name={name}"]
        if group is not None:
            srun.append(f"--het-group={group}")
        srun += [f"--nodes={count}", f"--ntasks={tasks * count}", f"--ntasks-per-node={tasks}"]
        return [*srun, *options]

    def _rpp(self, command: str, *words: str) -> list[str]:
        slurm = self.config.slurm
        python = "python3" if slurm.container else sys.executable
        rpp = [python, "-m", "megatron_rpp.cli", command, *words]
        return [*container_prefix(slurm), *rpp]


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
