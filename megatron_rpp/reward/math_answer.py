"""Right or wrong, by the final answer: exact comparison first, math-verify where that cannot tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_rpp.reward.extract import (
    MAX_ANSWER_CHARS,
    clean,
    final_answer,
    has_no_value,
    marked_answer,
    plain_number,
)
from megatron_rpp.reward.worker import Job
from megatron_rpp.reward.worker_pool import WorkerPool, unique

if TYPE_CHECKING:
    from megatron_rpp.experience.types import Rollout


class MathAnswerReward:
    """`correct` where the final answer equals the prompt's answer, else `wrong`.

    A truncated response scores only by an answer that it marks (a box, a tag, "answer is"): its last
    number is not a final answer. Arithmetic left to do, such as `12 + 5`, is not an answer to a
    problem whose answer is a number; else repeating the question would pay.
    """

    def __init__(self, correct: float = 1.0, wrong: float = 0.0, time_limit_s: float = 5.0) -> None:
        self._correct, self._wrong, self._time_limit_s = correct, wrong, time_limit_s
        self._pool = WorkerPool()

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        pairs = [(_answer_of(r.text, r.is_truncated), clean(r.prompt.answer)) for r in rollouts]
        verdicts = {pair: quick_verdict(*pair) for pair in pairs}
        open_pairs = unique([pair for pair in pairs if verdicts[pair] is None])
        scores = self._pool.score(Job("math", list(open_pairs), self._time_limit_s))
        verdicts.update({pair: score > 0.5 for pair, score in zip(open_pairs, scores, strict=True)})
        return [self._correct if verdicts[pair] else self._wrong for pair in pairs]

    def close(self) -> None:
        self._pool.close()


def quick_verdict(answer: str, gold: str) -> bool | None:
    """Whether the answer is right, or None where only math-verify can tell."""
    if not answer or not gold or len(answer) > MAX_ANSWER_CHARS:
        return False
    if answer.replace(" ", "") == gold.replace(" ", ""):
        return True
    wanted = plain_number(gold)
    if wanted is None:
        return None
    value = clean(answer.rsplit("=", 1)[-1])  # x = 5, 2 + 3 = 5
    given = plain_number(value)
    if given is None:
        return False if has_no_value(value) else None
    if wanted != given and ("/" in gold) != ("/" in value):
        return None  # 0.333333 for 1/3: math-verify rounds
    return wanted == given


def _answer_of(text: str, is_truncated: bool) -> str:
    return (marked_answer(text) or "") if is_truncated else final_answer(text)
