"""RUN_DIR/slurm/tries.json: what became of every start of the run, over all jobs that it took."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_rpp.config.schema import Config
from megatron_rpp.observability.files import write_whole
from megatron_rpp.observability.writers import read_metrics


@dataclass
class Try:
    """One start of a job."""

    RUNNING, DONE, STOPPED, FAILED, LOST_NODES = "running", "done", "stopped", "failed", "lost nodes"

    attempt: str  # JOB.RESTART
    nodes: list[str]
    first_step: int  # steps that were done when it began
    ending: str = RUNNING
    last_step: int = 0  # steps done when it ended
    cause: str = ""
    host: str = ""  # of the rank that the cause happened to
    bad_nodes: list[str] = field(default_factory=list)  # that are to be left out from now on

    @property
    def is_failure(self) -> bool:
        return self.ending in (Try.FAILED, Try.LOST_NODES)


class History:
    """Read anew at every call: guards and later jobs write it too."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "slurm" / "tries.json"

    def tries(self) -> list[Try]:
        if not self._path.exists():
            return []
        return [Try(**each) for each in json.loads(self._path.read_text())]

    def begin(self, attempt: str, nodes: Sequence[str], first_step: int) -> None:
        """A job has started. A try that nobody could end before is taken for failed."""
        tries = self.tries()
        for each in tries:
            if each.ending == Try.RUNNING:
                each.ending, each.cause, each.last_step = Try.FAILED, "it ended without a word", first_step
        self._write([*tries, Try(attempt, list(nodes), first_step)])

    def end(
        self, attempt: str, ending: str, cause: str, last_step: int, bad_nodes: Sequence[str] = (), host: str = ""
    ) -> None:
        tries = self.tries()
        for each in tries:
            if each.attempt == attempt:
                each.ending, each.cause, each.last_step = ending, cause, last_step
                each.bad_nodes, each.host = list(bad_nodes), host
        self._write(tries)

    def excluded(self) -> list[str]:
        """Every node that any try has found bad, the newest last."""
        found = [node for each in self.tries() for node in each.bad_nodes]
        return list(dict.fromkeys(found[::-1]))[::-1]

    def in_vain(self) -> int:
        """How many tries in a row, up to the newest, have failed without getting further than any before.

        A failure may throw the run back to its checkpoint: only a step that was never reached counts.
        """
        count, best = 0, 0
        for each in self.tries():
            count = count + 1 if each.is_failure and each.last_step <= best else 0
            best = max(best, each.last_step)
        return count

    def _write(self, tries: Sequence[Try]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps([asdict(each) for each in tries], indent=1) + "\n")


def steps_done(run_dir: Path) -> int:
    """Steps whose metrics are on file."""
    metrics = read_metrics(run_dir)
    return int(metrics[-1]["step"]) + 1 if metrics else 0


def is_complete(config: Config) -> bool:
    """Whether all steps are done, and saved where checkpoints are."""
    run_dir, steps = Path(config.run.dir), config.run.steps
    last = run_dir / "checkpoints" / f"step-{steps:06d}"  # as checkpoint.folders names it, which imports torch
    return steps_done(run_dir) >= steps and (last.is_dir() or config.checkpoint.interval == 0)
