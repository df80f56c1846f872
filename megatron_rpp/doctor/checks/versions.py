"""Do all nodes run the same software?"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from megatron_rpp.config.schema import Config
from megatron_rpp.doctor.finding import Finding, in_words, most_common
from megatron_rpp.doctor.job import Job

PACKAGES = ("torch", "megatron-core", "transformer-engine", "sglang", "transformers", "triton", "numpy")
ABSENT = "not installed"
_OURS = "megatron_rpp sources"


def measure() -> dict[str, str]:
    """{what: version} on this node."""
    from megatron_rpp.device.gpus import software  # imports torch

    found = {"python": platform.python_version(), _OURS: _digest(Path(__file__).parent.parent.parent)}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ABSENT
    return found | software()


def _digest(folder: Path) -> str:
    """Of every Python file below `folder`: tells an edited checkout from its commit."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def required(config: Config) -> list[str]:
    """Packages that the run cannot be without."""
    servers = [] if config.rollout.urls or config.rollout.urls_file else ["sglang"]
    engine = ["transformer-engine"] if config.model.layer_spec == "te" or config.fp8.is_on else []
    return ["torch", "megatron-core", "transformers", *servers, *engine]


def check(job: Job) -> list[Finding]:
    """Every node against what most nodes have."""
    return judge(job.ask("versions", "versions.measure", job.nodes), required(job.config))


def judge(answers: Mapping[str, Mapping[str, str]], needed: list[str]) -> list[Finding]:
    findings, usual = [], {}
    for what in dict.fromkeys(name for answer in answers.values() for name in answer):
        values = {node: answer.get(what, ABSENT) for node, answer in answers.items()}
        usual[what] = most_common(values)
        for node, value in values.items():
            if value != usual[what]:
                found = f"{what} is {value}, on the other nodes {usual[what]}"
                remedy = f"use one environment on all nodes: install {what} {usual[what]} on {node}, or drain it"
                findings.append(Finding("versions", "fail", found, remedy, node, True))
    for what in needed:
        if usual.get(what) == ABSENT:
            findings.append(Finding("versions", "fail", f"{what} is missing", f"pip install {what}, on all nodes"))
    shown = [f"{what} {usual[what]}" for what in ("python", "torch", "megatron-core", "sglang") if what in usual]
    return findings or [Finding("versions", "ok", f"the same everywhere: {in_words(shown)}")]
