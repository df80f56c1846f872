"""The score of a reasoning-gym task's own verifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_rpp.config.data import SourceConfig
from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.reward.math.extract import last_number, marked_answer, plain_number
from megatron_rpp.reward.workers.scorers import REASONING_GYM
from megatron_rpp.reward.workers.worker_pool import Limits, WorkerPool

if TYPE_CHECKING:
    from megatron_rpp.experience.types import Rollout


class ReasoningGymReward:
    """wrong + (correct - wrong) x the task's score, which may be partial.

    Verifiers want the bare answer: what the response marks, else all of it; where the entry's answer
    is a number and the response is not, the last number. Some verifiers evaluate the text, so they
    run in worker processes.
    """

    def __init__(self, config: RewardConfig, sources: Mapping[str, SourceConfig]) -> None:
        """sources: whose tasks these are, by Prompt.source."""
        self._correct, self._wrong = config.correct, config.wrong
        tasks = {name: (source.task, source.task_args) for name, source in sources.items()}
        self._pool = WorkerPool(REASONING_GYM, Limits.of(config), tasks=tasks)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        prompts = [r.prompt for r in rollouts]
        answers = [bare_answer(r.text, r.prompt.answer) for r in rollouts]
        items = [(answer, (p.source, p.metadata)) for answer, p in zip(answers, prompts, strict=True)]
        return [self._wrong + (self._correct - self._wrong) * score for score in self._pool.score(items)]

    def metrics(self) -> Metrics:
        return self._pool.metrics()

    def close(self) -> None:
        self._pool.close()


def bare_answer(text: str, gold: str) -> str:
    """What the verifier is given."""
    marked = marked_answer(text)
    if marked is not None:
        return marked
    text = text.strip()
    if plain_number(gold) is not None and plain_number(text) is None:
        return last_number(text)
    return text
