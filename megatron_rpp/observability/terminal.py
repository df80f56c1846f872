"""What rank 0 shows while it trains: a live table on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from megatron_rpp.observability.held_out import mean_accuracy
from megatron_rpp.observability.memory import largest_peak

if TYPE_CHECKING:
    from rich.console import RenderableType

ROWS = 15
"""Steps that the live table shows."""


@dataclass(frozen=True)
class Column:
    """One number of a step."""

    title: str
    key: str
    form: str


COLUMNS = (
    Column("reward", "reward/mean", ".3f"),
    Column("accuracy", "eval/accuracy", ".1%"),
    Column("KL", "kl/mean", ".4f"),
    Column("loss", "loss/total", "+.4f"),
    Column("clip", "clip/fraction", ".2%"),
    Column("tokens/s", "tokens_per_second", ",.0f"),
    Column("sync s", "time/sync", ".2f"),
)
MEMORY = Column("GiB", "memory/largest", ".0f")
"""Of the fullest GPU, in the phase that takes most. On CPU, where nobody counts, there is no such column."""


class Terminal:
    """`with Terminal(first_step, last_step) as terminal:` shows steps first_step .. last_step - 1."""

    def __init__(self, first_step: int, last_step: int, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._first, self._last = first_step, last_step
        self._start = time.monotonic()
        self._rows: list[list[str]] = []
        self._columns: tuple[Column, ...] = COLUMNS
        self._progress = ""
        self._live: Any = _live(self._out) if self._out.isatty() else None

    def update_progress(self, done: int, asked: int) -> None:
        """How many of the step's responses have been sampled. Shown on a terminal only."""
        self._progress = f"sampling {done}/{asked}" if done < asked else "scoring and training"
        self._refresh()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show one finished step."""
        if largest_peak(metrics) is not None:
            self._columns = (*COLUMNS, MEMORY)
        cells = _cells(step, metrics, self._remaining_s(step), self._columns)
        if self._live is None:
            titles = ["step", *(column.title for column in self._columns), "ETA"]
            pairs = zip(titles, cells, strict=True)
            self._out.write("  ".join(f"{title} {cell}" for title, cell in pairs) + "\n")
            self._out.flush()
        self._rows = [*self._rows, cells][-ROWS:]
        self._progress = ""
        self._refresh()

    def close(self) -> None:
        """Leave the last table on the screen."""
        self._progress = ""
        self._refresh()
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> Terminal:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _remaining_s(self, step: int) -> float:
        """Seconds to the end, by the mean step of this process so far."""
        per_step = (time.monotonic() - self._start) / (step + 1 - self._first)
        return per_step * (self._last - step - 1)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(_table(self._rows, self._progress, self._columns), refresh=True)


def _cells(step: int, metrics: Mapping[str, float], remaining_s: float, columns: Sequence[Column]) -> list[str]:
    derived = {"eval/accuracy": mean_accuracy(metrics), MEMORY.key: largest_peak(metrics)}
    shown = {**metrics, **{key: value for key, value in derived.items() if value is not None}}
    values = (format(shown[c.key], c.form) if c.key in shown else "-" for c in columns)
    return [str(step), *values, _duration(remaining_s)]


def _duration(seconds: float) -> str:
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_seconds:02}"


def _live(out: TextIO) -> Any:
    from rich.console import Console
    from rich.live import Live

    return Live(console=Console(file=out), auto_refresh=False)


def _table(rows: list[list[str]], progress: str, columns: Sequence[Column]) -> RenderableType:
    from rich import box
    from rich.table import Table

    # No lines between the columns: all of them must fit in 80 characters.
    table = Table(
        box=box.SIMPLE,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=progress or None,
        caption_justify="left",
    )
    for title in ("step", *(column.title for column in columns), "ETA"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row)
    return table
