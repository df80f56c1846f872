"""`rpp doctor CONFIG.toml`: what would stop the run, found on every node of the job, or on this host."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.load import load_config

DEADLINE_S = 180.0
_HELP = f"""rpp doctor CONFIG.toml ... [--section.key=value ...] [--json FILE] [--deadline SECONDS]

Checks what a run needs before time is burnt: in a SLURM job (a batch script or salloc) on every node of it,
elsewhere on this host. Run it once; it starts a probe on each node itself.

  --json FILE          where everything that was found is written; by default doctor.json in run.dir
  --deadline SECONDS   all of it takes no longer, give or take the time to end the probes; default {DEADLINE_S:g}

Exit code: 0 nothing stands in the way (warnings apart), 1 something does, 2 the command itself is wrong.
`rpp train --help` lists every setting.
"""


@dataclass(frozen=True)
class Arguments:
    """A `doctor` command line."""

    files: tuple[str, ...]
    overrides: tuple[str, ...]
    json_file: str | None
    deadline_s: float


def parse(words: Sequence[str]) -> Arguments:
    """Raises ConfigError."""
    values: dict[str, str] = {}
    rest: list[str] = []
    left = list(words[1:])
    while left:
        name, equals, value = left.pop(0).partition("=")
        if name not in ("--json", "--deadline"):
            rest.append(name + equals + value)
            continue
        if not equals and not left:
            raise ConfigError(f"{name} must be followed by its value")
        values[name] = value if equals else left.pop(0)
    files = tuple(word for word in rest if not word.startswith("-"))
    if not files:
        raise ConfigError("no configuration file; write: rpp doctor CONFIG.toml")
    overrides = tuple(word for word in rest if word.startswith("-"))
    return Arguments(files, overrides, values.get("--json"), _seconds(values.get("--deadline", str(DEADLINE_S))))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ConfigError(f"--deadline={text} must be a number of seconds above 0")
    return seconds


def run(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        sys.stdout.write(_HELP)
        return 0
    arguments = parse(words)
    config = load_config(arguments.files, arguments.overrides)
    from megatron_rpp.doctor.diagnose import diagnose
    from megatron_rpp.doctor.places import find_places
    from megatron_rpp.doctor.table import show, to_json
    from megatron_rpp.slurm.client import SlurmError

    try:
        places = find_places()
    except SlurmError as error:
        raise ConfigError(f"the nodes of this SLURM job are not known: {error}") from error
    diagnosis = diagnose(config, places, arguments.deadline_s)
    show(diagnosis, sys.stdout)
    path = Path(arguments.json_file or Path(config.run.dir) / "doctor.json")
    _write(path, to_json(diagnosis, arguments.files))
    return int(diagnosis.failed)


def _write(path: Path, report: dict[str, Any]) -> None:
    """The folder may be what is broken, so that this is no error of its own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(f"everything that was found: {path}\n")
    except OSError as error:
        sys.stderr.write(f"rpp doctor: cannot write {path}: {error.strerror}; name another file with --json\n")
