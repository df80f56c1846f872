"""What ended a job: each rank's report in RUN_DIR/failures/ATTEMPT/rank-N.json. Imports no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rpp.observability.files import write_whole
from megatron_rpp.observability.logs import log_path, tail

KINDS = ("error", "lost", "stall", "peer", "signal")
"""An exception, a rank without a sign of life, a phase past its limit, a broken collective, a signal; causes first."""
LINES_SHOWN = 20


@dataclass(frozen=True)
class Failure:
    """What happened to one rank."""

    rank: int  # that it happened to, which need not be the one that reports it
    host: str
    kind: str  # one of KINDS
    message: str
    lost_hosts: tuple[str, ...]  # hosts none of whose ranks gave a sign of life
    time: float  # Unix seconds
    exit_code: int = 1  # of the ranks that end because of it

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Failure:
        """From what `asdict` gave, as JSON has kept it. Raises KeyError or TypeError for other fields."""
        return cls(**{**fields, "lost_hosts": tuple(fields["lost_hosts"])})

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host or 'an unknown host'}: {self.message}"


@dataclass(frozen=True)
class _Report:
    failure: Failure
    rank: int  # who reports
    host: str


def folder(run_dir: str | Path, attempt: str) -> Path:
    """Where the ranks of one start of a job report."""
    return Path(run_dir) / "failures" / attempt


def report(run_dir: str | Path, attempt: str, failure: Failure, *, rank: int, host: str) -> None:
    """Write `failure` as seen by `rank` on `host`, unless that rank has reported already.

    Best effort: a full or lost disk must not take the place of the error.
    """
    path = folder(run_dir, attempt) / f"rank-{rank}.json"
    with contextlib.suppress(OSError):
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"by": {"rank": rank, "host": host}, **asdict(failure)}))


def causes(run_dir: str | Path, attempt: str) -> list[Failure]:
    """What the ranks of an attempt reported, each thing once, the first cause first; empty where nobody did.

    By kind as in KINDS, then by time. Where parts of a job that has come apart each take the others for lost,
    the word of the more ranks comes first, and in a tie that of rank 0's part.
    """
    reports = [each for path in folder(run_dir, attempt).glob("rank-*.json") if (each := _read(path)) is not None]
    alike: dict[tuple[int, str], list[_Report]] = {}
    for each in sorted(reports, key=lambda r: r.failure.time):
        alike.setdefault((each.failure.rank, each.failure.kind), []).append(each)
    return [_merge(group) for group in sorted(alike.values(), key=_weight)]


def lines(run_dir: str | Path, failure: Failure) -> list[str]:
    """For a terminal: the failure on one line, then the end of the log of the rank that it happened to."""
    log = log_path(run_dir, failure.rank)
    last = tail(log, LINES_SHOWN)
    return [f"rpp: {failure}", *([f"rpp: the end of {log}:", *last] if last else [])]


def _read(path: Path) -> _Report | None:
    """None for a file that another version of this code has written, or that is damaged."""
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        by = fields.pop("by")
        failure = Failure.from_json(fields)
        KINDS.index(failure.kind)
        return _Report(failure, int(by["rank"]), str(by["host"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _weight(group: Sequence[_Report]) -> tuple[int, int, bool, float]:
    first = group[0].failure
    is_lost = first.kind == "lost"
    return KINDS.index(first.kind), -len(group) if is_lost else 0, is_lost and first.rank == 0, first.time


def _merge(group: Sequence[_Report]) -> Failure:
    """The earliest; a host from which a rank reports the same has not been lost."""
    alive = {each.host for each in group}
    first = group[0].failure
    return replace(first, lost_hosts=tuple(host for host in first.lost_hosts if host not in alive))
