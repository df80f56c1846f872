"""`rpp doctor` on every node before anything is started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_LIMIT_S = 600.0  # the doctor has a deadline of its own


@dataclass(frozen=True)
class Checkup:
    """What the doctor found."""

    has_passed: bool
    bad_nodes: tuple[str, ...] = ()  # the job could go on without them
    cause: str = ""


def examine(words: Sequence[str], run_dir: Path) -> Checkup | None:
    """words: configuration files and overrides. The doctor's table goes to the job's log. None: it could not tell."""
    report = run_dir / "doctor.json"
    report.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "megatron_rpp.cli", "doctor", *words, f"--json={report}"]
    try:
        code = subprocess.run(argv, stdin=subprocess.DEVNULL, check=False, timeout=_LIMIT_S).returncode
    except subprocess.TimeoutExpired:
        return None
    if code == 0:
        return Checkup(has_passed=True)
    if not report.is_file():
        return None
    found = json.loads(report.read_text())
    bad_nodes = tuple(found["bad_nodes"])
    # Most nodes cannot be bad: then what they share is.
    is_theirs = found["only_nodes_fail"] and 2 * len(bad_nodes) <= len(found["nodes"])
    names = f" on {', '.join(bad_nodes)}" if bad_nodes else ""
    cause = f"rpp doctor found what would stop the run{names}; see {report}"
    return Checkup(False, bad_nodes if is_theirs else (), cause)
