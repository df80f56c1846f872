"""The command lines of a job's steps: servers, trainer, and a guard on every node."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from megatron_rpp.config.schema import Config
from megatron_rpp.slurm.allocation import Allocation, ranks_per_node
from megatron_rpp.slurm.srun import container_prefix, srun

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
        nodes, each = len(self.allocation.rollout_nodes), self.config.slurm.servers_per_node
        log = f"--output={self.config.run.dir}/logs/serve-%t.txt"
        options = [*self._group(1), "--kill-on-bad-exit=0", "--no-kill", log, "--open-mode=append"]
        keep = [*container_prefix(self.config.slurm), self._python, "-m", "megatron_rpp.slurm.keep"]
        return [*srun("serve", nodes, each, *options), *keep, *self._rpp("serve", *self.words, REGISTRY)]

    def train(self) -> list[str]:
        """One task a rank. Where one fails the others' watchdogs end them, and say which it was; `--wait` sees to it.

        (`--kill-on-bad-exit=1` would end them before they can tell.)
        """
        nodes = len(self.allocation.trainer_nodes)
        limit_s = math.ceil(max(60.0, 4 * self.config.watchdog.heartbeat_deadline_s))
        options = [*self._group(0), "--kill-on-bad-exit=0", f"--wait={limit_s}"]
        servers = len(self.allocation.rollout_nodes) * self.config.slurm.servers_per_node
        words = [*self.words, "--resume=auto", REGISTRY, f"--rollout.num_servers={servers}"]
        line = srun("train", nodes, ranks_per_node(self.config, nodes), *options)
        return [*line, *container_prefix(self.config.slurm), *self._rpp("train", *words)]

    def guard(self, host: str, port: int) -> list[str]:
        """One task a node, outside of any container: it may have to call SLURM's commands."""
        ends = ["--kill-on-bad-exit=0", "--no-kill"]
        if self.allocation.is_split:  # over both parts at once, which have their own numbers of nodes
            line = [
                "srun",
                "--overlap",
                "--mpi=none",
                "--job-name=guard",
                "--het-group=0,1",
                "--ntasks-per-node=1",
                *ends,
            ]
        else:
            line = srun("guard", len(self.allocation.nodes), 1, *ends)
        heartbeat = f"{self.config.watchdog.heartbeat_deadline_s:g}"
        module = [sys.executable, "-m", "megatron_rpp.slurm.guard"]
        return [*line, *module, host, str(port), heartbeat, self.config.run.dir, self.allocation.attempt]

    def _group(self, part: int) -> list[str]:
        return [f"--het-group={part}"] if self.allocation.is_split else []

    @property
    def _python(self) -> str:
        return "python3" if self.config.slurm.container else sys.executable

    def _rpp(self, command: str, *words: str) -> list[str]:
        return [self._python, "-m", "megatron_rpp.cli", command, *words]
