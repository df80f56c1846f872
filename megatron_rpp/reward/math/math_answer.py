"""Right or wrong, by the final answer: exact comparison first, `math_equal` in a worker where that cannot tell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.reward.math.extract import (
    MAX_ANSWER_CHARS,
    MAX_DEPTH,
    clean,
    depth,
    final_answer,
    has_no_value,
    marked_answer,
    plain_number,
)
from megatron_rpp.reward.math.normal_form import compact
from megatron_rpp.reward.workers.scorers import MATH
from megatron_rpp.reward.workers.worker_pool import Limits, WorkerPool

if TYPE_CHECKING:
    from megatron_rpp.experience.types import Rollout

_GROUPS = re.compile(r"\d\s+\d")  # 1 234, 1 1/2
_RESULT = re.compile(r"(?:[A-Za-z]|[-+*/.,\s\d]*)\s*=\s*([^=]*)")  # x = 5, 2 + 3 = 5


class MathAnswerReward:
    """`correct` where the final answer equals the prompt's answer, else `wrong`.

    A truncated response scores only by an answer that it marks (a box, a tag, "answer is"): its last
    number is not a final answer. Arithmetic left to do, such as `12 + 5`, is not an answer to a
    problem whose answer is a number; else repeating the question would pay.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._correct, self._wrong = config.correct, config.wrong
        self._pool = WorkerPool(MATH, Limits.of(config))

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        pairs = [(_answer_of(r.text, r.is_truncated), clean(r.prompt.answer)) for r in rollouts]
        verdicts = {pair: quick_verdict(*pair) for pair in pairs}
        open_pairs = [pair for pair, verdict in verdicts.items() if verdict is None]
        scores = self._pool.score(open_pairs)
        verdicts.update({pair: score > 0.5 for pair, score in zip(open_pairs, scores, strict=True)})
        return [self._correct if verdicts[pair] else self._wrong for pair in pairs]

    def metrics(self) -> Metrics:
        return self._pool.metrics()

    def close(self) -> None:
        self._pool.close()


def quick_verdict(answer: str, gold: str) -> bool | None:
    """Whether the answer is right, or None where only a worker can tell."""
    if not answer or not gold or len(answer) > MAX_ANSWER_CHARS:
        return False
    if compact(answer) == compact(gold):
        return True
    if depth(answer) > MAX_DEPTH:
        return False
    wanted = plain_number(gold)
    if wanted is None:
        return None
    if "=" in answer:
        result = _RESULT.fullmatch(answer)
        if result is None:
            return None
        answer = clean(result[1])
        if answer.isalpha():
            return None  # 5 = x
    given = plain_number(answer)
    if given is None:
        return False if has_no_value(answer) and not _GROUPS.search(answer) else None
    if wanted != given and ("/" in gold) != ("/" in answer):
        return None  # 0.333333 for 1/3: math-verify rounds
    return wanted == given


def _answer_of(text: str, is_truncated: bool) -> str:
    return (marked_answer(text) or "") if is_truncated else final_answer(text)
