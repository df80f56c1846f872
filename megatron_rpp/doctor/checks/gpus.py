"""Has every node the GPUs that the run counts on, of one kind, and can they what it asks of them?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_rpp.config.fp8_recipes import why_not
from megatron_rpp.config.schema import Config
from megatron_rpp.doctor.finding import Finding, faults, most_common
from megatron_rpp.doctor.job import Job

_LOST = "look at nvidia-smi and dmesg on the node, and drain it; or ask for other nodes (slurm.gpus_per_node)"
_BF16, _FP8 = (8, 0), (8, 9)


def measure() -> list[dict[str, Any]]:
    """The GPUs of this node that the job may use, each with the versions of CUDA and Transformer Engine there."""
    from megatron_rpp.device.gpus import gpus, package_version, software  # imports torch

    versions = {"cuda": software().get("CUDA", ""), "engine": package_version("transformer-engine")}
    return [{**asdict(each), **versions} for each in gpus()]


def check(job: Job) -> list[Finding]:
    """Count and kind on every node. Leaves the smallest memory for the check of memory."""
    answers = job.ask("gpus", "gpus.measure", job.nodes)
    sizes = [int(gpu["memory_bytes"]) for held in answers.values() for gpu in held]
    job.gpu_bytes = min(sizes, default=0)
    return judge(answers, job.config)


def judge(answers: Mapping[str, Sequence[Mapping[str, Any]]], config: Config) -> list[Finding]:
    counts = {node: len(held) for node, held in answers.items()}
    if not answers:
        return []
    wanted = config.slurm.gpus_per_node or most_common(counts)
    if not wanted and not any(counts.values()):
        return [Finding("gpus", "ok", "no GPU, and none asked for: the run is on CPU")]
    short = {node: f"{n} GPUs are usable, not {wanted}" for node, n in counts.items() if n < wanted}
    findings = faults("gpus", short, answers, _LOST, travels=False)
    kinds = {node: ", ".join(sorted({str(gpu["name"]) for gpu in held})) for node, held in answers.items() if held}
    if kinds:
        usual = most_common(kinds)
        other = {node: f"its GPUs are {kind}, the others' {usual}" for node, kind in kinds.items() if kind != usual}
        findings += faults("gpus", other, answers, "ask for nodes of one kind: --constraint or --partition")
    findings += faults("gpus", _unable(answers, config), answers, "ask for other GPUs, or for another dtype or recipe")
    return findings or [Finding("gpus", "ok", _summary(answers, wanted))]


def _unable(answers: Mapping[str, Sequence[Mapping[str, Any]]], config: Config) -> dict[str, str]:
    """Nodes whose GPUs lack the number formats of the configuration."""
    needed = {
        "model.dtype=bfloat16": _BF16 if config.model.dtype == "bfloat16" else (0, 0),
        "weight_sync.dtype=float8": _FP8 if config.weight_sync.dtype == "float8" else (0, 0),
    }
    found = {}
    for node, held in answers.items():
        for setting, least in needed.items():
            for gpu in held:
                if tuple(gpu["capability"]) < least:
                    has = ".".join(map(str, gpu["capability"]))
                    found[node] = f"{setting} needs compute capability {least[0]}.{least[1]}, {gpu['name']} has {has}"
        for gpu in held:
            versions = {name: str(gpu.get(name, "")) for name in ("cuda", "engine")}
            if reason := why_not(config.fp8.recipe, str(gpu["name"]), tuple(gpu["capability"]), **versions):
                found[node] = reason
    return found


def _summary(answers: Mapping[str, Sequence[Mapping[str, Any]]], count: int) -> str:
    gpu = next(gpu for held in answers.values() for gpu in held)
    float8 = "FP8" if tuple(gpu["capability"]) >= _FP8 else "no FP8"
    return f"{count} x {gpu['name']} a node, {gpu['memory_bytes'] / 2**30:.0f} GiB, {float8}"
