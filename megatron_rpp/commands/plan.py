"""`rpp plan CONFIG.toml ... [--section.key=value ...] [--gpus N] [--gpu-memory-gb G] [--json FILE]`."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rpp.commands.words import split
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fields import flatten
from megatron_rpp.config.load import load_config
from megatron_rpp.config.ranges import check_ranges
from megatron_rpp.config.schema import Config

_USAGE = """rpp plan CONFIG.toml ... [--section.key=value ...] [--gpus N] [--gpu-memory-gb G] [--json FILE]

The memory that a run needs on each GPU, by part and pipeline stage, and whether it fits. Reads config.json of
model.path and nothing else of it; needs no GPU.

  --gpus N           GPUs of the trainer; parallel.data is what N leaves (default: the configuration's layout)
  --gpu-memory-gb G  memory of one GPU in GiB (default: 80)
  --json FILE        write the plan in bytes as well

Exit code: 0 if it fits; 1 if not, and then with settings that make it fit.
"""


def run(words: Sequence[str]) -> int:
    """Print the plan; 1 where it does not fit."""
    given = split(words[1:], _USAGE, options=("--gpus", "--gpu-memory-gb", "--json"))
    config, options, json_file = load_config(given.files, given.overrides), given.options, given.filled("--json")
    gpus = _positive_int("--gpus", options["--gpus"]) if "--gpus" in options else None
    gpu_gb = _positive("--gpu-memory-gb", options.get("--gpu-memory-gb", "80"))
    check_ranges(flatten(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron tells of every optional package that is not installed
        text, report = _answer(config, gpus, gpu_gb * 2**30)
    sys.stdout.write(text)
    if json_file is not None:
        _write(json_file, report)
    return 0 if report["fits"] else 1


def _answer(config: Config, gpus: int | None, gpu_bytes: float) -> tuple[str, dict[str, Any]]:
    """(for the terminal, for --json)."""
    from megatron_rpp.plan import plan, suggest, table  # imports torch

    found = plan(config, gpus)
    text, report = table.text(found, gpu_bytes), table.as_json(found, gpu_bytes)
    if not found.fits(gpu_bytes):
        better = suggest(config, found.gpus, gpu_bytes)
        text += table.verdict(found, gpu_bytes, better)
        report["suggestion"] = better.as_dict() if better else None
    return text, report


def _positive_int(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{name}={text} must be a whole number of at least 1")
    return int(text)


def _positive(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name}={text} must be a number above 0")
    return value


def _write(path: str, report: dict[str, object]) -> None:
    try:
        Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json={path} cannot be written: {error.strerror}") from error
