"""What a response votes for where the most frequent answer of several counts."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

from megatron_rpp.reward.math.extract import MAX_ANSWER_CHARS, final_answer, marked_answer, plain_number
from megatron_rpp.reward.math.normal_form import normal_form, without_separators

if TYPE_CHECKING:
    from megatron_rpp.experience.types import Rollout

_FRACTION = re.compile(r"(-?)\s*\\frac\{(-?\d+)\}\{(\d+)\}")


def vote(rollout: Rollout) -> str | Fraction | None:
    """The final answer, so that equal ones compare equal; None where there is none.

    Numbers are equal by their value, all else by its normal form. No mathematics is done: `x+1` and `1+x` are two
    answers. A truncated response votes only by an answer that it marks, as it scores.
    """
    text = marked_answer(rollout.text) if rollout.is_truncated else final_answer(rollout.text)
    if not text or len(text) > MAX_ANSWER_CHARS:
        return None
    plain = without_separators(normal_form(text)).replace(" ", "")
    number = plain_number(_FRACTION.sub(r"\1\2/\3", plain.rsplit("=", 1)[-1]))  # x = 5, 2 + 3 = 5
    return plain if number is None else number
