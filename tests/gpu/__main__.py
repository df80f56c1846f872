"""Runs all GPU tests and prints a short table: `python -m tests.gpu [pytest's own arguments]`.

The exit code is pytest's: 0 where all have passed or were skipped for want of a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


class Table:
    """A pytest plugin: one line a test."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("tests/gpu/")[2] or report.nodeid
        self._seconds[name] = self._seconds.get(name, 0.0) + report.duration
        if report.outcome != "passed" or name not in self._outcomes:
            reason = f" ({report.longrepr[2]})" if report.skipped and isinstance(report.longrepr, tuple) else ""
            self._outcomes[name] = report.outcome + reason

    def lines(self) -> list[str]:
        """Test, outcome, seconds of set-up, test and clean-up."""
        width = max(map(len, self._outcomes), default=0)
        return [f"{name:{width}}  {self._seconds[name]:7.1f} s  {end}" for name, end in self._outcomes.items()]


def main() -> int:
    table = Table()
    here = str(Path(__file__).parent)
    code = pytest.main([here, "-q", "--no-header", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[table])
    sys.stdout.write("\n".join(["", *table.lines(), ""]))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
