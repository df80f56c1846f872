"""Where a job's store listens, as a record, and the file that tells it: RUN_DIR/rendezvous/ATTEMPT.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_rpp.observability.files import write_whole

KEY = "rendezvous"
"""Of the record in the store itself, which tells it from a store that has taken over its port."""
_published: list[Path] = []


@dataclass(frozen=True)
class Rendezvous:
    """Where the store of one start of a job listens."""

    attempt: str
    host: str  # rank 0's
    address: str
    port: int
    world_size: int
    time: float  # when the store was opened, in seconds since 1970
    prefix: str = ""  # of the job's keys, where the store is not the job's alone

    def connect(self, timeout: timedelta) -> dist.Store:
        """The job's store, as one more client. Raises ConnectionError where it is gone, or is another job's."""
        try:
            store = self.client(timeout)
            found = store.get(KEY).decode()
        except dist.DistError as error:
            raise ConnectionError(f"no store answers at {self.address}:{self.port}") from error
        if found != self.packed():
            raise ConnectionError(f"{self.address}:{self.port} is the store of another job")
        return store

    def client(self, timeout: timedelta) -> dist.Store:
        """The store that listens there, whosever it is. Raises DistError."""
        store = dist.TCPStore(self.address, self.port, is_master=False, wait_for_workers=False, timeout=timeout)
        return dist.PrefixStore(self.prefix, store) if self.prefix else store

    def packed(self) -> str:
        """As the store holds it under KEY."""
        return json.dumps(asdict(self))


def rendezvous_of(store: dist.Store) -> Rendezvous:
    """Where `store`, which open_store gave, listens; and the name of this start of the job."""
    return Rendezvous(**json.loads(store.get(KEY)))


def newest_rendezvous(run_dir: str | Path) -> Rendezvous | None:
    """The last store that a job in `run_dir` has opened; it may be gone, where that job was killed."""
    found = [each for path in _folder(run_dir).glob("*.json") if isinstance(each := read(path), Rendezvous)]
    return max(found, key=lambda each: each.time, default=None)


def publish(here: Rendezvous, run_dir: str | None) -> None:
    """Write the file, where there is a run directory; until `withdraw`."""
    if run_dir is not None:
        path = file_of(run_dir, here.attempt)
        write(path, asdict(here))
        _published.append(path)


def publish_error(run_dir: str, attempt: str, error: str) -> None:
    """Write, in place of the record, why rank 0 has no store that others could reach."""
    write(file_of(run_dir, attempt), {"attempt": attempt, "error": error})


def withdraw() -> None:
    """Remove the file in which this process has said where its store is."""
    while _published:
        _published.pop().unlink(missing_ok=True)


def file_of(run_dir: str | Path, attempt: str) -> Path:
    return _folder(run_dir) / f"{attempt}.json"


def read(path: Path) -> Rendezvous | str | None:
    """The file's store, rank 0's error, or None where there is no file (any more)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return str(content["error"]) if "error" in content else Rendezvous(**content)


def write(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content))


def _folder(run_dir: str | Path) -> Path:
    return Path(run_dir) / "rendezvous"
