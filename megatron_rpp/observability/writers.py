"""metrics.jsonl and TensorBoard events in the run directory. Rank 0 writes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_rpp.observability.files import write_whole


def metrics_path(run_dir: str | Path) -> Path:
    """One JSON object a step."""
    return Path(run_dir) / "metrics.jsonl"


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The steps on file, in order. A last line that a killed run left half written is dropped."""
    path = metrics_path(run_dir)
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is not complete


class MetricsWriter:
    """Appends one step at a time, durably."""

    def __init__(self, run_dir: str | Path, resume_step: int, *, tensorboard: bool = True) -> None:
        """`resume_step` is the first step to be run; it and later ones on file are cut off. 0: a new run."""
        self._path = metrics_path(run_dir)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _cut(run_dir, resume_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = _tensorboard(run_dir, resume_step) if tensorboard else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one line and the same scalars to TensorBoard; on disk when this returns.

        Raises:
            RuntimeError: a value is NaN or infinite; the message names its key. Nothing is written.
        """
        for key, value in metrics.items():
            if not math.isfinite(value):
                raise RuntimeError(f"step {step}: {key} is {value}; metrics must be finite numbers")
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            for key, value in metrics.items():
                self._board.add_scalar(key, value, step)
            self._board.flush()

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cut(run_dir: str | Path, resume_step: int) -> None:
    """Keep the steps before `resume_step`, so that a resumed run has each step once."""
    path = metrics_path(run_dir)
    if not path.exists():
        return
    kept = [record for record in read_metrics(run_dir) if record["step"] < resume_step]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept), durable=True)


def _tensorboard(run_dir: str | Path, resume_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what an interrupted run wrote past the checkpoint that this one continues from.
    return SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=resume_step or None)
