"""The table that `python -m tests.gpu` prints: a line a test as it ends, and what it raised.

It is kept in a journal too, a JSON object a line, so that another process can go on where one has died.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BROKEN = 70
"""Exit code of a process whose GPU is lost to it: the tests behind are another's."""
LINES_SHOWN = 40
"""Of what a test raised; the journal has all of it."""


def read(journal: Path) -> list[dict[str, Any]]:
    """What has happened. A line that was cut off is left out."""
    found = []
    for text in journal.read_text().splitlines() if journal.exists() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def write(journal: Path, **event: Any) -> None:
    with journal.open("a") as file:
        file.write(json.dumps(event) + "\n")


def line(event: dict[str, Any]) -> str:
    """Seconds of set-up, test and clean-up; outcome; name; why."""
    reason = f" ({event['reason']})" if event["reason"] else ""
    return f"{event['seconds']:7.1f} s  {event['outcome']:7}  {event['name'].removeprefix('tests/gpu/')}{reason}"


def say(journal: Path, name: str, outcome: str, seconds: float = 0.0, reason: str = "", text: str = "") -> None:
    """One end: into the journal, and on standard output at once."""
    event = {"event": "end", "name": name, "outcome": outcome, "seconds": seconds, "reason": reason, "text": text}
    write(journal, **event)
    shown = [f"    {each}" for each in text.splitlines()[-LINES_SHOWN:]]
    sys.stdout.write("\n".join([*shown, line(event), ""]))
    sys.stdout.flush()


class Table:
    """A pytest plugin, in place of pytest's own summary."""

    def __init__(self, journal: Path, is_broken: Callable[[], bool], leave: Callable[[int], None]) -> None:
        """is_broken: whether no other test can run in this process; leave: ends it with an exit code, at once."""
        self._journal, self._is_broken, self._leave = journal, is_broken, leave
        self._ended = {event["name"] for event in read(journal) if event["event"] == "end"}
        self._reports: list[pytest.TestReport] = []  # of the running test

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Those that an earlier process has ended are not run again."""
        items[:] = [item for item in items if item.nodeid not in self._ended]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported, say."""
        if report.failed and report.nodeid not in self._ended:
            text = report.longreprtext
            reason = next((each.removeprefix("E").strip() for each in text.splitlines()[::-1] if each.strip()), "")
            say(self._journal, report.nodeid, "not collected", reason=reason, text=text)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        write(self._journal, event="start", name=nodeid)
        self._reports = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str]:
        """No dots between the lines; counted as pytest does."""
        if report.when == "call" or not report.passed:
            return "error" if report.failed and report.when != "call" else report.outcome, "", ""
        return "", "", ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """The worst of set-up, test and clean-up."""
        seconds = sum(report.duration for report in self._reports)
        failed = [report for report in self._reports if report.failed]
        skipped = [report for report in self._reports if report.skipped]
        text = "\n".join(report.longreprtext for report in failed)
        reason = str(skipped[0].longrepr[2]) if skipped and isinstance(skipped[0].longrepr, tuple) else ""
        outcome = "failed" if failed else "skipped" if skipped else "passed"
        say(self._journal, nodeid, outcome, seconds, "" if failed else reason, text)
        if failed and self._is_broken():
            self._leave(BROKEN)
