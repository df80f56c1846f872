"""What is paid for the form of a response, whatever it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.reward.math.extract import boxed_answer
from megatron_rpp.reward.workers.scorers import PATTERN
from megatron_rpp.reward.workers.worker_pool import Limits, WorkerPool

if TYPE_CHECKING:
    from megatron_rpp.experience.types import Rollout


class FormatReward:
    """reward.format_reward for a response of the wanted form; a negative amount for one that has it not."""

    def __init__(self, config: RewardConfig) -> None:
        self._format, self._amount = config.format, config.format_reward
        # A regular expression can take for ever on some texts, so it runs where it can be killed.
        self._pool: WorkerPool | None = None
        if config.format == "pattern":
            self._pool = WorkerPool(PATTERN, Limits.of(config), pattern=config.format_pattern)
        self._metrics = Metrics()

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        if self._format == "none":
            return [0.0] * len(rollouts)
        has_format = self._has_format(rollouts)
        self._metrics.add_mean("reward/format_mean", sum(has_format), len(has_format))
        return [self._amount if has == (self._amount > 0) else 0.0 for has in has_format]

    def metrics(self) -> Metrics:
        """reward/format_mean, the share of responses that have the form; what the workers report."""
        taken, self._metrics = self._metrics, Metrics()
        if self._pool is not None:
            taken.merge(self._pool.metrics())
        return taken

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def _has_format(self, rollouts: Sequence[Rollout]) -> list[bool]:
        if self._pool is not None:
            return [score > 0.5 for score in self._pool.score([(r.text, None) for r in rollouts])]
        if self._format == "boxed":
            return [bool((boxed_answer(r.text) or "").strip()) for r in rollouts]
        return [has_thought(r.text, is_open=r.prompt.opens_thought) for r in rollouts]


def has_thought(text: str, *, is_open: bool = False) -> bool:
    """Whether it is `<think>`, a thought, `</think>` and an answer, each tag once; the prompt may open it."""
    text = text.strip()
    body = text.removeprefix("<think>")
    if (body == text and not is_open) or text.count("<think>") > 1 or "<think>" in body:
        return False
    thought, tag, answer = body.partition("</think>")
    return bool(tag and thought.strip() and answer.strip()) and "</think>" not in answer
