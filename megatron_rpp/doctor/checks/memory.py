"""Does the run fit the memory of its GPUs, or of its nodes on CPU?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from megatron_rpp.doctor.checks.layout import from_json, to_json
from megatron_rpp.doctor.finding import Finding
from megatron_rpp.doctor.job import Job

LIMIT_S = 120.0
_REMEDY = "`rpp plan` shows what takes the memory, and which layout or setting makes it fit"


def measure(values: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """{"peak_bytes", "needed_bytes", "offloaded_bytes"} of the fullest rank, and "host_bytes" of the node; or
    {"error": why there is no plan}.
    """
    from megatron_rpp.plan import plan  # imports megatron

    try:
        planned = plan(from_json(values), gpus)
    except ValueError as error:
        return {"error": str(error)}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "peak_bytes": planned.worst.peak_bytes,
        "needed_bytes": planned.needed_bytes,
        "offloaded_bytes": max(stage.host_bytes for stage in planned.stages),
        "host_bytes": host,
    }


def check(job: Job) -> list[Finding]:
    """On one node: the answer is the same on all."""
    if any(finding.check == "layout" and finding.status == "fail" for finding in job.findings):
        return [Finding("memory", "warn", "not estimated", "cure what the check of the layout has found")]
    ranks = job.config.parallel.world_size
    about = {"values": to_json(job.config), "gpus": ranks}
    answers = job.ask("memory", "memory.measure", job.trainer_nodes[:1], LIMIT_S, **about)
    on_a_node = -(-ranks // len(job.places.trainer_nodes))
    return [judge(answer, job.gpu_bytes, on_a_node) for answer in answers.values()]


def judge(answer: Mapping[str, Any], gpu_bytes: int, ranks: int) -> Finding:
    """ranks: on a node. gpu_bytes: of the smallest GPU; 0: on CPU, where the ranks of a node share its memory."""
    if "error" in answer:
        return Finding("memory", "fail", str(answer["error"]), _REMEDY)
    needed, has, of = answer["needed_bytes"], gpu_bytes, "a GPU"
    host, offloaded = answer["host_bytes"], answer["offloaded_bytes"] * ranks
    if not gpu_bytes:
        needed, has, of = answer["peak_bytes"] * ranks + offloaded, host, f"a node, with {ranks} ranks,"
    elif offloaded > host:
        found = f"memory.offload takes {_gib(offloaded)} of host memory on a node, which has {_gib(host)}"
        return Finding("memory", "fail", found, _REMEDY)
    found = f"{of} needs {_gib(needed)} and has {_gib(has)}"
    return Finding("memory", "ok", found) if needed <= has else Finding("memory", "fail", found, _REMEDY)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
