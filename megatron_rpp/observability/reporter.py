"""What a rank writes and shows: rank 0 the metrics and the terminal, each replica its rollouts, others nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType

from megatron_rpp.observability.rollouts import RolloutLike, Skipped, write_rollouts, write_skipped
from megatron_rpp.observability.terminal import Terminal
from megatron_rpp.observability.writers import MetricsWriter


class Reporter:
    """`with Reporter(...) as reporter:` around the steps that it reports."""

    def __init__(self, run_dir: str, *, rank: int, replica: int | None, steps: range) -> None:
        """`replica` is the data-parallel index on the rank that writes its rollouts, else None."""
        self._run_dir, self._replica, self._stack = run_dir, replica, ExitStack()
        self._writer: MetricsWriter | None = None
        self._terminal: Terminal | None = None
        if rank == 0:
            self._writer = self._stack.enter_context(MetricsWriter(run_dir, steps.start))
            self._terminal = self._stack.enter_context(Terminal(steps.start, steps.stop))

    def progress(self, done: int, asked: int) -> None:
        """Responses sampled so far in this step."""
        if self._terminal is not None:
            self._terminal.update_progress(done, asked)

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        rollouts: Sequence[RolloutLike],
        rewards: Sequence[float],
        skipped: Sequence[Skipped] = (),
    ) -> None:
        """Record one finished step. skipped: of all replicas."""
        if self._replica is not None:
            write_rollouts(self._run_dir, step, rollouts, rewards, replica=self._replica)
        if self._replica == 0:
            write_skipped(self._run_dir, step, skipped)
        if self._writer is not None and self._terminal is not None:
            self._writer.write(step, metrics)
            self._terminal.step(step, metrics)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
