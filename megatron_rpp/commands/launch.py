"""`rpp launch slurm CONFIG.toml ... --nodes N [--dry-run]`: checks, renders and submits a job."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rpp.commands.train import check_run
from megatron_rpp.commands.words import answer_help, split
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.layout_words import in_short
from megatron_rpp.config.load import load_config
from megatron_rpp.config.preflight import make_folders
from megatron_rpp.config.schema import Config
from megatron_rpp.slurm import client
from megatron_rpp.slurm.allocation import ranks_per_node
from megatron_rpp.slurm.script import render

_SYNOPSIS = "rpp launch slurm CONFIG.toml ... [--section.key=value ...] --nodes N [--dry-run]"
_USAGE = f"""{_SYNOPSIS}

Checks configuration, model and data, and that the layout fits the nodes; says who runs where; writes the batch script
to RUN_DIR/slurm/job.sbatch and submits it.

  --nodes N    nodes of the whole job, those of slurm.rollout_nodes among them
  --dry-run    show the script and the command that would submit it; write and submit nothing

What is asked of the cluster (account, partition, time limit, GPUs, container, ...) is in the section slurm of the
configuration; `rpp train --help` lists its keys. More: docs/cluster.md.
"""


def run(words: Sequence[str]) -> int:
    """Submit, and say what was submitted. With --dry-run only the latter."""
    answer_help(words, _USAGE)
    if words[1:2] != ["slurm"]:
        raise ConfigError(f"write: {_SYNOPSIS}; launch/mpi and launch/local hold the scripts for others")
    given = split(words[2:], _USAGE, options=("--nodes",), flags=("--dry-run",))
    nodes = _number(given.options.get("--nodes", ""))
    config = load_config(given.files, given.overrides)
    lines = check(config, nodes)
    path = Path(config.run.dir) / "slurm" / "job.sbatch"
    argv = [str(path), *given.settings]
    text = render(config, nodes)
    told = "\n".join([*lines, describe(config, nodes)])
    sys.stdout.write(f"{told}\n\n# {path}\n{text}\nsbatch {shlex.join(argv)}\n")
    if "--dry-run" in given.options:
        return 0
    make_folders(config, "train")
    (Path(config.run.dir) / "logs").mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    job_id = client.submit(argv)
    sys.stdout.write(f"submitted job {job_id}; its log is {config.run.dir}/logs/slurm-{job_id}.txt\n")
    return 0


def check(config: Config, nodes: int) -> list[str]:
    """The configuration can run, and fits the allocation: a line on each source's prompts. Raises ValueError."""
    lines = check_run(config, "train")
    trainer_nodes = nodes - config.slurm.rollout_nodes
    if trainer_nodes < 1:
        raise ConfigError(f"--nodes {nodes} must be above slurm.rollout_nodes={config.slurm.rollout_nodes}")
    ranks_per_node(config, trainer_nodes)
    if config.rollout.urls or config.rollout.urls_file:
        raise ConfigError("rollout.urls and rollout.urls_file must be empty: the job starts its own servers")
    return lines


def describe(config: Config, nodes: int) -> str:
    """Who runs where, in words."""
    slurm, world = config.slurm, config.parallel.world_size
    trainer_nodes = nodes - slurm.rollout_nodes
    kind = f" with {slurm.gpus_per_node} GPUs each" if slurm.gpus_per_node else ""
    places = f"{slurm.rollout_nodes} more nodes" if slurm.rollout_nodes else "the same nodes"
    return (
        f"{trainer_nodes} trainer nodes{kind}: {in_short(config.parallel)} = "
        f"{world} ranks, {world // trainer_nodes} on each\n"
        f"{slurm.servers_per_node} SGLang servers (TP {config.rollout.server_tensor}) on each of {places}"
    )


def _number(nodes: str) -> int:
    if not nodes.isdecimal() or int(nodes) < 1:
        raise ConfigError(f"--nodes {nodes} must be a number of nodes; write: {_SYNOPSIS}")
    return int(nodes)
