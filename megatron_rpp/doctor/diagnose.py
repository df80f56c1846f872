"""All checks, in order: what others rely on comes first."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_rpp.config.schema import Config
from megatron_rpp.doctor.checks import (
    clock,
    disk,
    folders,
    gpus,
    layout,
    limits,
    memory,
    model,
    names,
    network,
    ports,
    reach,
    versions,
)
from megatron_rpp.doctor.finding import Finding
from megatron_rpp.doctor.job import Job
from megatron_rpp.doctor.places import Places
from megatron_rpp.doctor.probes import Probes

CHECKS: tuple[tuple[str, Callable[[Job], list[Finding]]], ...] = (
    ("clock", clock.check),
    ("names", names.check),
    ("reach", reach.check),
    ("limits", limits.check),
    ("ports", ports.check),
    ("folders", folders.check),
    ("versions", versions.check),
    ("gpus", gpus.check),
    ("layout", layout.check),
    ("model", model.check),
    ("disk", disk.check),
    ("memory", memory.check),
    ("network", network.check),
)


@dataclass(frozen=True)
class Diagnosis:
    """Of a whole job."""

    places: Places
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def bad_nodes(self) -> list[str]:
        """Nodes that another one in their place would cure."""
        accused = {finding.node for finding in self.findings if finding.blames_node and finding.status == "fail"}
        return [node for node in self.places.nodes if node in accused]

    @property
    def only_nodes_fail(self) -> bool:
        """Whether the job could run without its bad nodes; else it would fail on any others, too."""
        return self.failed and all(finding.blames_node for finding in self.findings if finding.status == "fail")

    @property
    def failed(self) -> bool:
        return any(finding.status == "fail" for finding in self.findings)


def diagnose(config: Config, places: Places, deadline_s: float) -> Diagnosis:
    """Start a probe on every node, ask all that there is to ask, and end them; within `deadline_s` and a little."""
    start = time.monotonic()
    probes = Probes(places.groups, lambda group, nodes: group.command(nodes, config.slurm))
    try:
        job = Job(config, places, probes, start + deadline_s)
        job.greet()
        for name, check in CHECKS:
            if not job.nodes:
                break
            if job.left_s() > 0:
                job.findings += check(job)
            else:
                remedy = "give the doctor longer with --deadline=SECONDS, or cure what took so long first"
                job.findings.append(Finding(name, "fail", f"not looked at within {deadline_s:g} s", remedy))
    finally:
        probes.close()
    return Diagnosis(places, tuple(job.findings), time.monotonic() - start)
