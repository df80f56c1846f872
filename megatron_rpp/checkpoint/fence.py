"""RUN_DIR/attempt: which start of the job owns the run directory."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path

from megatron_rpp.observability.files import write_whole
from megatron_rpp.parallel.environment import node_name
from megatron_rpp.parallel.exit_codes import TakenOver


class Fence:
    """Rank 0's. A job that was given up for dead, and is not, finds here that its replacement has started."""

    def __init__(self, run_dir: str | Path, attempt: str) -> None:
        """attempt: names this start of the job; it is for people, a random token tells two starts apart."""
        self._path, self._attempt, self._token = Path(run_dir) / "attempt", attempt, uuid.uuid4().hex

    def claim(self) -> None:
        """From here on the run directory is this job's."""
        told = {"attempt": self._attempt, "token": self._token, "host": node_name(), "time": time.time()}
        write_whole(self._path, json.dumps(told) + "\n", durable=True)

    def check(self) -> None:
        """Raises TakenOver where another job has claimed it since."""
        try:
            told = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        if told.get("token") != self._token:
            raise TakenOver(
                f"another job has taken over run.dir={self._path.parent}: attempt {told.get('attempt')!r} on "
                f"{told.get('host')}; this one, {self._attempt!r}, writes nothing more there"
            )
