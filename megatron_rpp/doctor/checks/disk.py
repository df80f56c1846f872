"""Is there room for what the run writes?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from megatron_rpp.config.schema import Config
from megatron_rpp.doctor.finding import Finding, faults
from megatron_rpp.doctor.job import Job

LOGS_BYTES = 64 * 2**20
_WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
_ADAM_BYTES = 12  # a parameter: float32 copy and two moments


def measure(folders: Mapping[str, str]) -> dict[str, list[int]]:
    """{setting: [free bytes, bytes that checkpoints already take there]}."""
    found = {}
    for setting, folder in folders.items():
        there = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
        stat = os.statvfs(there)
        found[setting] = [stat.f_bavail * stat.f_frsize, _held(Path(folder))]
    return found


def _held(folder: Path) -> int:
    total = 0
    for path in folder.glob("step-*/*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue  # the run that writes there has just removed it
    return total


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """One checkpoint: the model in its dtype and, in float32, what Adam keeps."""
    return parameters * (_WEIGHT_BYTES.get(config.model.dtype, 4) + _ADAM_BYTES)


def needed_bytes(config: Config, parameters: int) -> dict[str, int]:
    """{setting: bytes} at the fullest: the checkpoints that are kept, the one being written, and the rest."""
    checkpoint = config.checkpoint
    held = checkpoint.keep + 1 + (config.run.steps // checkpoint.keep_every if checkpoint.keep_every else 0)
    all_checkpoints = held * checkpoint_bytes(config, parameters) if checkpoint.interval else 0
    weights = parameters * _WEIGHT_BYTES.get(config.model.dtype, 4)
    on_disk = weights if "disk" in config.weight_sync.transports else 0
    in_run_dir = 0 if config.weight_sync.disk_path else on_disk
    return {
        "run.dir": all_checkpoints + in_run_dir + LOGS_BYTES,
        "checkpoints of run.dir": all_checkpoints,
        "weight_sync.disk_path": on_disk,
    }


def check(job: Job) -> list[Finding]:
    """On every node: a folder may be another file system there."""
    answers = job.ask("disk", "disk.measure", job.nodes, folders=job.folders())
    return judge(answers, needed_bytes(job.config, job.parameters), job.folders(), job.parameters)


def judge(
    answers: Mapping[str, Mapping[str, list[int]]],
    needed: Mapping[str, int],
    folders: Mapping[str, str],
    parameters: int,
) -> list[Finding]:
    """What checkpoints hold already is not needed again: the run that has written them goes on."""
    findings = []
    for setting, folder in folders.items():
        short = {}
        for node, answer in answers.items():
            free, held = answer[setting]
            if free + held < needed[setting]:
                short[node] = f"{setting}={folder} has {_gb(free)} free, and the run needs {_gb(needed[setting])}"
        remedy = f"free {folder} or choose another; checkpoint.keep and checkpoint.interval=0 change what is needed"
        findings += faults("disk", short, answers, remedy)
    if not parameters:
        unknown = "the model's size is not known, so neither is what checkpoints need"
        findings.append(Finding("disk", "warn", unknown, "cure what the check of the model has found"))
    words = ", ".join(f"{_gb(needed[setting])} in {setting}" for setting in folders)
    return findings or [Finding("disk", "ok", f"room for {words}")]


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
