"""Does the configuration hold together, does its layout divide the model, and does it fit the allocation?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fields import build, flatten
from megatron_rpp.config.layout_words import in_short
from megatron_rpp.config.schema import Config
from megatron_rpp.doctor.finding import Finding, faults
from megatron_rpp.doctor.job import Job
from megatron_rpp.doctor.places import Places
from megatron_rpp.slurm.allocation import ranks_per_node

_REMEDY = "change the setting that is named; `rpp plan` shows layouts that fit"


def to_json(config: Config) -> dict[str, Any]:
    """For `from_json` on a node: the file of the configuration may not be there."""
    return flatten(config)


def from_json(values: Mapping[str, Any]) -> Config:
    return build({key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def measure(values: Mapping[str, Any]) -> str:
    """What is wrong with the configuration as this node sees its files; empty: nothing."""
    from megatron_rpp.config.validate import validate
    from megatron_rpp.model.checks import check_model  # imports torch

    config = from_json(values)
    try:
        validate(config, "train")
        check_model(config, "train")
    except ConfigError as error:
        return str(error)
    return ""


def check(job: Job) -> list[Finding]:
    """On every node, as data and model must be found there; and once against the allocation."""
    answers = job.ask("layout", "layout.measure", job.nodes, values=to_json(job.config))
    wrong = {node: error for node, error in answers.items() if error}
    findings = faults("layout", wrong, answers, _REMEDY)
    if job.places.job_id:
        findings += judge_allocation(job.config, job.places)
    words = f"{in_short(job.config.parallel)} divides the model"
    return findings or [Finding("layout", "ok", words + (" and the nodes" if job.places.job_id else ""))]


def judge_allocation(config: Config, places: Places) -> list[Finding]:
    """The ranks spread evenly over the trainer's nodes, and servers have theirs."""
    findings = []
    try:
        each = ranks_per_node(config, len(places.trainer_nodes))
    except ConfigError as error:
        return [Finding("layout", "fail", str(error), "change the layout, or the number of nodes: sbatch --nodes")]
    split = len(places.rollout_nodes) if places.rollout_nodes != places.trainer_nodes else 0
    if split != config.slurm.rollout_nodes:
        found = f"slurm.rollout_nodes={config.slurm.rollout_nodes} and the job has {split} nodes for servers alone"
        findings.append(Finding("layout", "fail", found, f"set slurm.rollout_nodes={split}, or submit anew"))
    if config.slurm.gpus_per_node > each and split:
        found = f"{each} ranks a node leave {config.slurm.gpus_per_node - each} of its GPUs idle"
        remedy = f"raise parallel.data from {config.parallel.data}; the job has {config.parallel.world_size} ranks"
        findings.append(Finding("layout", "warn", found, remedy))
    return findings
