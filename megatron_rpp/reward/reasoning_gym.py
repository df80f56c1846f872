"""The score of a reasoning-gym task's own verifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_rpp.reward.extract import last_number, marked_answer, plain_number
from megatron_rpp.reward.worker import Job
from megatron_rpp.reward.worker_pool import WorkerPool

if TYPE_CHECKING:
    from megatron_rpp.experience.types import Rollout


class ReasoningGymReward:
    """wrong + (correct - wrong) x the task's score, which may be partial.

    Verifiers want the bare answer: what the response marks, else all of it; where the entry's answer
    is a number and the response is not, the last number. Some verifiers evaluate the text, so they
    run in worker processes.
    """

    def __init__(
        self,
        task: str,
        task_args: dict[str, Any] | None = None,
        correct: float = 1.0,
        wrong: float = 0.0,
        time_limit_s: float = 5.0,
    ) -> None:
        self._task, self._task_args = task, dict(task_args or {})
        self._correct, self._wrong, self._time_limit_s = correct, wrong, time_limit_s
        self._pool = WorkerPool()

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        items = [(bare_answer(r.text, r.prompt.answer), r.prompt.metadata) for r in rollouts]
        job = Job("reasoning_gym", list(items), self._time_limit_s, self._task, self._task_args)
        return [self._wrong + (self._correct - self._wrong) * score for score in self._pool.score(job)]

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
