"""A diagnosis for people: a row a check, then what to do; and as JSON for programs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from megatron_rpp.doctor.diagnose import Diagnosis
from megatron_rpp.doctor.finding import Finding, Status, in_words

if TYPE_CHECKING:
    from rich.table import Table

_WORST: tuple[Status, ...] = ("fail", "warn", "ok")
_STYLES = {"fail": "bold red", "warn": "yellow", "ok": "green"}


def show(diagnosis: Diagnosis, out: TextIO) -> None:
    """The table, each trouble with its remedy, and a last line that says which nodes to leave out."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(file=out, width=None if out.isatty() else 160, highlight=False, soft_wrap=False)
    console.print(_table(diagnosis.findings))
    for finding in _troubles(diagnosis.findings):
        where = f"{finding.node}: " if finding.node else ""
        style = _STYLES[finding.status]
        console.print(f"[{style}]{finding.status}[/] {finding.check}: {escape(where + finding.found)}", soft_wrap=True)
        console.print(f"     do: {escape(finding.remedy)}", soft_wrap=True)
    console.print(escape(_verdict(diagnosis)), soft_wrap=True)


def to_json(diagnosis: Diagnosis, files: Iterable[str]) -> dict[str, Any]:
    """files: of the configuration. A next try without `bad_nodes` helps where `only_nodes_fail`."""
    places = diagnosis.places
    return {
        "ok": not diagnosis.failed,
        "bad_nodes": diagnosis.bad_nodes,
        "only_nodes_fail": diagnosis.only_nodes_fail,
        "findings": [asdict(finding) for finding in diagnosis.findings],
        "nodes": list(places.nodes),
        "trainer_nodes": list(places.trainer_nodes),
        "rollout_nodes": list(places.rollout_nodes),
        "job_id": places.job_id,
        "config": list(files),
        "seconds": round(diagnosis.seconds, 1),
        "time": time.time(),
    }


def _troubles(findings: Iterable[Finding]) -> list[Finding]:
    return sorted((f for f in findings if f.status != "ok"), key=lambda finding: _WORST.index(finding.status))


def _table(findings: Iterable[Finding]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for title in ("check", "status", "found"):
        table.add_column(title, overflow="fold")
    by_check: dict[str, list[Finding]] = {}
    for finding in findings:
        by_check.setdefault(finding.check, []).append(finding)
    for check, group in by_check.items():
        status = min((finding.status for finding in group), key=_WORST.index)
        table.add_row(check, f"[{_STYLES[status]}]{status}[/]", escape(_summary(group, status)))
    return table


def _summary(group: list[Finding], status: Status) -> str:
    worst = [finding for finding in group if finding.status == status]
    nodes = list(dict.fromkeys(finding.node for finding in worst if finding.node))
    if status == "ok" or not nodes:
        return worst[-1].found
    return f"{in_words(nodes)}: {worst[0].found}"


def _verdict(diagnosis: Diagnosis) -> str:
    where = f"{len(diagnosis.places.nodes)} nodes" if diagnosis.places.job_id else "this host"
    if not diagnosis.failed:
        return f"{where} can run it ({diagnosis.seconds:.0f} s)"
    bad = diagnosis.bad_nodes
    advice = f"; leave out with sbatch --exclude={','.join(bad)}" if bad and diagnosis.places.job_id else ""
    return f"{where} cannot run it{advice} ({diagnosis.seconds:.0f} s)"
