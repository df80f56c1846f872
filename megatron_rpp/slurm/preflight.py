"""`rpp doctor` on every node before anything is started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Checkup:
    """What the doctor found."""

    has_passed: bool
    bad_nodes: tuple[str, ...] = ()  # the job can go on without them
    cause: str = ""


def examine(words: Sequence[str], run_dir: Path) -> Checkup:
    """words: configuration files and overrides. The doctor's table goes to the job's log."""
    report = run_dir / "doctor.json"
    report.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "megatron_rpp.cli", "doctor", *words, f"--json={report}"]
    code = subprocess.run(argv, stdin=subprocess.DEVNULL, check=False).returncode
    if code == 0:
        return Checkup(has_passed=True)
    bad_nodes: tuple[str, ...] = ()
    if report.is_file():
        found = json.loads(report.read_text())
        bad_nodes = tuple(found["bad_nodes"]) if found["only_nodes_fail"] else ()
    names = f" on {', '.join(bad_nodes)}" if bad_nodes else ""
    return Checkup(False, bad_nodes, f"rpp doctor found what would stop the run{names}; see {report}")
