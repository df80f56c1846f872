"""What a check is given: the configuration, the nodes, and the means to ask them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rpp.config.schema import Config
from megatron_rpp.doctor.finding import Finding
from megatron_rpp.doctor.places import Places
from megatron_rpp.doctor.probes import Probes

ANSWER_S = 60.0
"""The longest that a node may take over any question."""
_GONE = "drain the node, or leave it out of the job: sbatch --exclude={node}"


@dataclass
class Job:
    """One run of the doctor. The fields at its end are what checks leave for later ones."""

    config: Config
    places: Places
    probes: Probes
    deadline: float  # of time.monotonic()
    hosts: dict[str, str] = field(default_factory=dict)  # each node's own host name
    findings: list[Finding] = field(default_factory=list)
    addresses: dict[str, str] = field(default_factory=dict)  # that other nodes reach each by
    parameters: int = 0  # of the model; 0: not known
    gpu_bytes: int = 0  # memory of the smallest GPU; 0: there is none

    @property
    def nodes(self) -> list[str]:
        """Those that answer."""
        return self.probes.nodes

    @property
    def trainer_nodes(self) -> list[str]:
        return [node for node in self.nodes if node in self.places.trainer_nodes]

    @property
    def serving_nodes(self) -> list[str]:
        """Those that SGLang servers of this job are started on."""
        rollout = self.config.rollout
        if rollout.registry or (rollout.spawns_servers and len(self.places.nodes) > 1):
            return [node for node in self.nodes if node in self.places.rollout_nodes]
        return self.trainer_nodes[:1] if rollout.spawns_servers else []

    def left_s(self, limit_s: float = ANSWER_S) -> float:
        """Seconds that the next question may take."""
        return max(0.0, min(limit_s, self.deadline - time.monotonic()))

    def greet(self) -> None:
        """Wait for the probes, and note who has none."""
        greetings = self.probes.greet(self.left_s())
        self.hosts = {node: said["host"] for node, said in greetings.items()}
        self._note_silent("answer")
        for node, said in greetings.items():
            if said["folder_error"]:
                remedy = f"mount the shared file system on {node}, or start the job in a folder that every node has"
                self.findings.append(Finding("answer", "fail", said["folder_error"], remedy, node, True))
        words = f"{len(self.nodes)} of {len(self.places.nodes)} nodes answer"
        if not self.places.job_id:
            words = "this host alone: not in a SLURM job"
        self.findings.append(Finding("answer", "ok", words))

    def ask(
        self, check: str, task: str, nodes: Sequence[str], answer_s: float = ANSWER_S, **about: Any
    ) -> dict[str, Any]:
        """The answers of the nodes that give one, in order; one that does not, or fails at it, is a finding."""
        return {node: answer for node, (answer, _) in self.ask_when(check, task, nodes, answer_s, **about).items()}

    def ask_when(
        self, check: str, task: str, nodes: Sequence[str], answer_s: float = ANSWER_S, **about: Any
    ) -> dict[str, tuple[Any, float]]:
        """As `ask`, each answer with the front's time when it came."""
        answers: dict[str, tuple[Any, float]] = {}
        for node, message, when in self.probes.ask(task, about, nodes, self.left_s(answer_s)):
            if "error" in message:
                remedy = f"run it by hand on {node}: python -c 'import megatron_rpp.doctor.checks.{check}'"
                self.findings.append(Finding(check, "fail", message["error"], remedy, node, True))
            else:
                answers[node] = (message["answer"], when)
        self._note_silent(check)
        return answers

    def folders(self) -> Mapping[str, str]:
        """What the run writes to: {setting: absolute path}."""
        run_dir = Path(self.config.run.dir).absolute()
        folders = {"run.dir": str(run_dir)}
        if self.config.checkpoint.interval:
            folders["checkpoints of run.dir"] = str(run_dir / "checkpoints")
        sync = self.config.weight_sync
        if "disk" in sync.transports and sync.disk_path:
            folders["weight_sync.disk_path"] = str(Path(sync.disk_path).absolute())
        return folders

    def _note_silent(self, check: str) -> None:
        known = {finding.node for finding in self.findings if finding.remedy.startswith(_GONE[:10])}
        for node, why in self.probes.silent.items():
            if node not in known:
                self.findings.append(Finding(check, "fail", why, _GONE.format(node=node), node, True))
