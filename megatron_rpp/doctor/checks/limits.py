"""What the operating system allows a process on each node."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping

from megatron_rpp.doctor.finding import Finding, faults
from megatron_rpp.doctor.job import Job

FILES = 4096  # sockets of NCCL or gloo, shards of a checkpoint, requests in flight
_UNLIMITED = resource.RLIM_INFINITY


def measure() -> dict[str, int]:
    """Soft limits of this process; -1 is none."""
    files, locked = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    return {"files": files, "locked_bytes": locked, "has_infiniband": int(os.path.isdir("/sys/class/infiniband"))}


def check(job: Job) -> list[Finding]:
    """Both are warnings: small jobs get by."""
    return judge(job.ask("limits", "limits.measure", job.nodes))


def judge(answers: Mapping[str, Mapping[str, int]]) -> list[Finding]:
    files, locked = {}, {}
    for node, answer in answers.items():
        if answer["files"] != _UNLIMITED and answer["files"] < FILES:
            files[node] = f"{answer['files']} open files are allowed to a process"
        if answer["has_infiniband"] and answer["locked_bytes"] != _UNLIMITED:
            locked[node] = f"{answer['locked_bytes']} bytes of locked memory are allowed; InfiniBand registers far more"
    raise_files = "run `ulimit -n 65536` in slurm.setup, or set LimitNOFILE for slurmd"
    unlock = "set LimitMEMLOCK=infinity for slurmd, and PropagateResourceLimitsExcept=MEMLOCK in slurm.conf"
    findings = faults("limits", files, answers, raise_files, status="warn")
    findings += faults("limits", locked, answers, unlock, status="warn")
    return findings or [Finding("limits", "ok", "open files and locked memory suffice")]
