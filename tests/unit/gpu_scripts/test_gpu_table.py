"""`pytest tests/gpu` without a GPU skips everything, says why, and the table has a line a test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.gpu.__main__ import Table

REPOSITORY = Path(__file__).parents[3]


def report(name: str, when: str, outcome: str, duration: float, longrepr: Any = None) -> Any:
    return SimpleNamespace(
        nodeid=f"tests/gpu/{name}", when=when, outcome=outcome, duration=duration, longrepr=longrepr,
        skipped=outcome == "skipped",
    )  # fmt: skip


def test_a_line_has_the_worst_outcome_and_the_time_of_all_phases() -> None:
    table = Table()
    for when, outcome in (("setup", "passed"), ("call", "failed"), ("teardown", "passed")):
        table.pytest_runtest_logreport(report("test_a.py::test_b", when, outcome, 1.5))
    table.pytest_runtest_logreport(report("test_c.py::test_d", "setup", "skipped", 0.0, ("f", 1, "Skipped: one GPU")))
    first, second = table.lines()
    assert first.split() == ["test_a.py::test_b", "4.5", "s", "failed"]
    assert second.endswith("skipped (Skipped: one GPU)")


def test_without_a_gpu_every_test_is_skipped_with_the_reason() -> None:
    """And a plain `pytest` does not collect them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu"], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("test_") and " s  " in line]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) > 20 and all(line.endswith("skipped (Skipped: no CUDA GPU)") for line in lines), done.stdout
