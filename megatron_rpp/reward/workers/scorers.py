"""What runs in worker processes: makers of functions (answer, item's own data) -> score, from 0 to 1 but for FUNCTION.

Each imports what it needs when it is called, in the worker's parent process, once.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any

MATH = "megatron_rpp.reward.workers.scorers:math_scorer"
REASONING_GYM = "megatron_rpp.reward.workers.scorers:gym_scorer"
PATTERN = "megatron_rpp.reward.workers.scorers:pattern_scorer"
FUNCTION = "megatron_rpp.reward.workers.scorers:function_scorer"


def math_scorer() -> Callable[[str, str], float]:
    """1.0 where the answer equals the gold text."""
    from megatron_rpp.reward.math.math_equal import is_equal

    is_equal("2x", "x+x")  # builds the tables of its grammar here, not in every worker
    return lambda answer, gold: float(is_equal(answer, gold))


def gym_scorer(tasks: Mapping[str, tuple[str, dict[str, Any]]]) -> Callable[[str, tuple[str, dict[str, Any]]], float]:
    """The task's own score. tasks: key -> (task, its arguments); items are (answer, (key, entry))."""
    import reasoning_gym

    datasets = {key: reasoning_gym.create_dataset(task, size=1, seed=0, **args) for key, (task, args) in tasks.items()}
    return lambda answer, item: float(datasets[item[0]].score_answer(answer, item[1]))


def pattern_scorer(pattern: str) -> Callable[[str, None], float]:
    """1.0 where the regular expression is found in the text."""
    compiled = re.compile(pattern)
    return lambda text, _: float(compiled.search(text) is not None)


def function_scorer(path: str) -> Callable[[str, Any], float | str]:
    """What the user's function at `path` gives a rollout; of a list of rollouts {"rewards": [..]} or {"error": ..}."""
    from megatron_rpp.reward.function import load_function, rewards_of

    function = load_function(path)  # before the next line, which imports torch, here and not in every worker
    from megatron_rpp.experience.types import Rollout

    def one(rollout: Rollout) -> float:
        try:
            return rewards_of(path, function, [rollout])[0]
        except Exception as error:
            raise MemoryError from error  # no score, and not the score 0: counted as broken

    def together(rollouts: list[Rollout]) -> str:
        try:
            return json.dumps({"rewards": rewards_of(path, function, rollouts)})
        except MemoryError:
            raise
        except Exception as error:  # the trainer is to say it
            where = "".join(traceback.format_tb(error.__traceback__)[-3:])
            return json.dumps({"error": f"{error}", "kind": type(error).__name__, "where": where})

    return lambda _, data: one(data) if isinstance(data, Rollout) else together(data)
