"""The batch script of a configuration: one of launch/slurm, with the configuration's own options."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rpp.config.schema import Config

TEMPLATES = Path(__file__).resolve().parents[2] / "launch" / "slurm"
_PART = "#SBATCH hetjob"


def render(config: Config, nodes: int) -> str:
    """nodes: all of them, also those of slurm.rollout_nodes."""
    rollout_nodes = config.slurm.rollout_nodes
    template = TEMPLATES / ("disaggregated.sbatch" if rollout_nodes else "colocated.sbatch")
    head, *parts = template.read_text(encoding="utf-8").split(_PART)
    common = _options(config)
    texts = [_with_options(head, {**common, **_first(config), "--nodes": str(nodes - rollout_nodes)})]
    texts[0] = _with_lines(texts[0], config.slurm.sbatch_args)
    texts += [_with_options(part, {**common, "--nodes": str(rollout_nodes)}) for part in parts]
    return _with_start(_PART.join(texts), config.slurm.setup)


def _options(config: Config) -> dict[str, str]:
    """sbatch's options of every part; an empty one is left out of the script."""
    slurm = config.slurm
    return {
        "--account": slurm.account,
        "--partition": slurm.partition,
        "--qos": slurm.qos,
        "--time": slurm.time,
        "--gpus-per-node": str(slurm.gpus_per_node or ""),
    }


def _first(config: Config) -> dict[str, str]:
    """Options of the part that the batch script runs in."""
    return {
        "--signal": f"B:USR1@{config.slurm.checkpoint_before_end_s}",
        "--output": f"{config.run.dir}/logs/slurm-%j.txt",
    }


def _with_options(text: str, options: Mapping[str, str]) -> str:
    """`text` with its #SBATCH lines of `options` replaced or, where they are empty, dropped; new ones behind them."""
    lines, left = [], dict(options)
    last = 0
    for line in text.splitlines():
        name = line.removeprefix("#SBATCH ").partition("=")[0] if line.startswith("#SBATCH ") else ""
        if name in left:
            value = left.pop(name)
            line = f"#SBATCH {name}={value}" if value else ""
        if line or not name:
            lines.append(line)
        if name:
            last = len(lines)
    lines[last:last] = [f"#SBATCH {name}={value}" for name, value in left.items() if value]
    return "\n".join(lines) + "\n"


def _with_lines(text: str, arguments: Sequence[str]) -> str:
    """slurm.sbatch_args as #SBATCH lines, behind the others: a replacement of the job has them too."""
    head, last, tail = text.rpartition("#SBATCH")
    line, end, rest = tail.partition("\n")
    return "".join([head, last, line, end, *(f"#SBATCH {argument}\n" for argument in arguments), rest])


def _with_start(text: str, setup: str) -> str:
    """This very Python runs the job, after the setup line."""
    line = ': "${RPP_PYTHON:=.venv/bin/python}"'
    assert line in text, "the template's start has changed"
    own = f"RPP_PYTHON={shlex.quote(sys.executable)}"
    return text.replace(line, "\n".join([*filter(None, [setup]), own]))
