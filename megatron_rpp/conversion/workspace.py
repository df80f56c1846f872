"""OUT.partial: where a conversion works until it is whole, and the journal that lets it continue after a kill."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from megatron_rpp.observability.files import sync_path

JOURNAL = ".conversion-journal.jsonl"  # first line: the fingerprint; then a line for each finished file
_FORMAT = 1  # of the journal and of how work is divided into files


@dataclass
class Workspace:
    """The folder OUT.partial, held by this process alone."""

    folder: Path
    journal: TextIO
    done: dict[str, Any] = field(default_factory=dict)  # finished file -> what was noted of it

    def note(self, file: str, note: Any) -> None:
        """`file` is whole and on disk: a restart will not write it again."""
        sync_path(self.folder)
        size = (self.folder / file).stat().st_size
        line = json.dumps({"file": file, "bytes": size, "note": note})
        self.journal.write(line + "\n")
        self.journal.flush()
        os.fsync(self.journal.fileno())
        self.done[file] = json.loads(line)["note"]  # as a restart reads it

    @property
    def done_bytes(self) -> int:
        """Size of the finished files."""
        return sum((self.folder / file).stat().st_size for file in self.done)


def fingerprint(source: Path, options: dict[str, Any]) -> str:
    """Of every file of `source` (name, size, time) and of what was asked for."""
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(source.iterdir()) if p.is_file()]
    text = json.dumps([_FORMAT, str(source.resolve()), files, options])
    return hashlib.sha256(text.encode()).hexdigest()


def require_absent(out: Path) -> None:
    """ValueError where `out` exists, or there is no folder to make it in."""
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists and is never overwritten; choose another directory, or remove it first")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} must be an existing directory; make it first")


def require_disk(out: Path, needed: int) -> None:
    """ValueError where the file system of `out` cannot take `needed` bytes, less what an earlier start has written."""
    partial = partial_of(out)
    written = sum(p.stat().st_size for p in partial.iterdir()) if partial.is_dir() else 0
    free = shutil.disk_usage(out.parent).free
    if free + written < needed:
        raise ValueError(
            f"{out.parent} has {(free + written) / 1e9:.3f} GB free and {out.name} needs {needed / 1e9:.3f} GB; "
            "free some, or choose another file system"
        )


def partial_of(out: Path) -> Path:
    """Where the conversion to `out` works."""
    return out.with_name(out.name + ".partial")


@contextmanager
def open_workspace(out: Path, key: str) -> Iterator[Workspace]:
    """OUT.partial, continued where its journal has the fingerprint `key`; it becomes `out` at the end.

    On an error nothing is left; on a signal or a kill OUT.partial stays, for the next start to continue.

    Raises ValueError where another process works there, or the folder is somebody else's.
    """
    folder = partial_of(out)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / JOURNAL).is_file():
        raise ValueError(f"{folder} is in the way, and no conversion's; move it, or choose another --out")
    folder.mkdir(exist_ok=True)
    with _locked(folder / JOURNAL) as journal:
        try:
            workspace = Workspace(folder, journal, _resume(folder, journal, key))
            yield workspace
            _sync_others(workspace)
            sync_path(folder)
            require_absent(out)
            folder.rename(out)
            (out / JOURNAL).unlink()  # until then it says whose folder this is
            sync_path(out)
            sync_path(out.parent)
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def _locked(path: Path) -> Iterator[TextIO]:
    with path.open("a+", encoding="utf-8") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is converting to {path.parent}; wait for it, or end it") from error
        yield journal


def _resume(folder: Path, journal: TextIO, key: str) -> dict[str, Any]:
    """What an earlier start of the same conversion finished; everything else in the folder is removed."""
    journal.seek(0)
    lines = journal.read().splitlines()
    done: dict[str, Any] = {}
    if lines and _parsed(lines[0]) == {"fingerprint": key}:
        for line in map(_parsed, lines[1:]):
            if line and _has_size(folder / line["file"], line["bytes"]):
                done[line["file"]] = line["note"]
        sys.stderr.write(f"continuing {folder}: {len(done)} finished files are kept\n")
    elif len(list(folder.iterdir())) > 1:
        sys.stderr.write(f"{folder} is of another source or other options: starting afresh\n")
    for path in folder.iterdir():
        if path.name not in done and path.name != JOURNAL:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _rewrite(folder, journal, key, done)
    return done


def _rewrite(folder: Path, journal: TextIO, key: str, done: dict[str, Any]) -> None:
    """Without what was cut off or discarded. A kill in the middle costs the next start its savings, no more."""
    entries = [{"file": file, "bytes": (folder / file).stat().st_size, "note": note} for file, note in done.items()]
    journal.seek(0)
    journal.truncate()
    journal.write("".join(json.dumps(line) + "\n" for line in ({"fingerprint": key}, *entries)))
    journal.flush()
    os.fsync(journal.fileno())


def _parsed(line: str) -> Any:
    """None for a line that a kill cut off."""
    with contextlib.suppress(ValueError):
        return json.loads(line)
    return None


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _sync_others(workspace: Workspace) -> None:
    """Indices and what stands beside the weights."""
    for path in workspace.folder.rglob("*"):
        if path.is_file() and path.name not in workspace.done:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
