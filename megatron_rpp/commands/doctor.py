"""`rpp doctor CONFIG.toml`: what would stop the run, found on every node of the job, or on this host."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rpp.commands.words import split
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
    """Raises ConfigError, HelpAsked."""
    given = split(words[1:], _HELP, options=("--json", "--deadline"))
    deadline_s = _seconds(given.options.get("--deadline", str(DEADLINE_S)))
    return Arguments(given.files, given.overrides, given.filled("--json"), deadline_s)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ConfigError(f"--deadline={text} must be a number of seconds above 0")
    return seconds


def run(words: Sequence[str]) -> int:
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
