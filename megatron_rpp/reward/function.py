"""A reward function of the user's: `package.module:name` or `file.py:name`, called in worker processes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.reward.protocol import RewardError
from megatron_rpp.reward.workers.scorers import FUNCTION
from megatron_rpp.reward.workers.scoring_worker import Failure
from megatron_rpp.reward.workers.worker_pool import Limits, WorkerPool

if TYPE_CHECKING:
    from megatron_rpp.experience.types import Rollout

logger = logging.getLogger(__name__)

_WHY = {Failure.TIME: "was not done within reward.batch_time_limit_s", Failure.BROKEN: "broke its process"}


class FunctionReward:
    """What the function at reward.function returns: one finite number for each rollout.

    It is given all of a call together, in one worker. Where that hits a limit or ends the worker, it is given
    each rollout by itself, so that one response costs no other its reward; those that fail again earn reward.wrong.
    """

    def __init__(self, config: RewardConfig, beside: FunctionReward | None = None) -> None:
        """beside: the same function's for other responses, whose processes are this one's, too."""
        self._config, self._path = config, config.function
        pool = None if beside is None else beside._pool
        self._pool: WorkerPool = WorkerPool(
            FUNCTION, Limits.of(config), most=math.inf, beside=pool, path=config.function
        )

    def start(self) -> None:
        """Imports the function in a process of its own, as the first call would. ConfigError where there is none."""
        try:
            self._pool.start()
        except RuntimeError as error:
            _, is_ours, message = str(error).partition(": ConfigError: ")
            raise ConfigError(message if is_ours else f"reward.function={self._path}: {error}") from error

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Raises RewardError where the function does, for a result that is no list of rewards, and where all fail."""
        if not rollouts:
            return []
        said = self._pool.score_together(list(rollouts), self._config.batch_time_limit_s)
        if isinstance(said, Failure):
            logger.warning(
                "reward.function=%s %s with %d responses; now it is given one at a time",
                self._path, _WHY[said], len(rollouts),
            )  # fmt: skip
            return self._one_by_one(rollouts)
        return self._rewards(said, len(rollouts))

    def metrics(self) -> Metrics:
        """reward/timeouts and reward/broken: responses that failed by themselves."""
        return self._pool.metrics()

    def close(self) -> None:
        self._pool.close()

    def _one_by_one(self, rollouts: Sequence[Rollout]) -> list[float]:
        scores = self._pool.try_score([("", rollout) for rollout in rollouts])
        if len(scores) > 1 and all(score is None for score in scores):
            limits = self._config
            raise RewardError(
                f"reward.function={self._path} gave none of {len(scores)} responses a reward, neither together nor one "
                f"at a time: raise reward.batch_time_limit_s={limits.batch_time_limit_s:g} (of a call), "
                f"reward.time_limit_s={limits.time_limit_s:g} (of a response) or "
                f"reward.memory_limit_mb={limits.memory_limit_mb}, or mend the function"
            )
        return [self._config.wrong if score is None else score for score in scores]

    def _rewards(self, said: str, count: int) -> list[float]:
        """Of the worker's line, which what ran there may have written."""
        try:
            found = json.loads(said)
            rewards = found.get("rewards")
        except (ValueError, AttributeError) as error:
            raise RewardError(f"reward.function={self._path} wrote to its worker's socket: {said!r:.100}") from error
        if isinstance(rewards, list) and len(rewards) == count:
            return [float(reward) for reward in rewards]
        message, kind = found.get("error"), found.get("kind")
        if kind == RewardError.__name__:
            raise RewardError(message)
        raise RewardError(f"reward.function={self._path} raised {kind}: {message}\n{found.get('where')}")


def rewards_of(path: str, function: Callable[[list[Rollout]], Sequence[float]], rollouts: list[Rollout]) -> list[float]:
    """What `function`, which is at `path`, returns. Raises RewardError where that is no list of finite numbers."""
    values = function(rollouts)
    try:
        found = list(values)
    except TypeError as error:
        raise RewardError(f"reward.function={path} must return a list, not {values!r:.100}") from error
    if len(found) != len(rollouts):
        raise RewardError(f"reward.function={path} gave {len(found)} rewards for {len(rollouts)} responses")
    return [_number(path, value) for value in found]


def _number(path: str, value: object) -> float:
    if hasattr(value, "item"):
        value = value.item()  # of a tensor or an array
    if not isinstance(value, Real) or not math.isfinite(value):
        raise RewardError(f"reward.function={path} gave {value!r:.100}; a reward must be a finite number")
    return float(value)


def load_function(path: str) -> Callable[[list[Rollout]], Sequence[float]]:
    """The function at `package.module:name` or `file.py:name`. Raises ConfigError, saying what is missing."""
    place, _, name = path.rpartition(":")
    try:
        module = _module(place)
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(
            f"reward.function={path}: {place} cannot be imported: {type(error).__name__}: {error}; "
            "name a file, or put the module's folder on PYTHONPATH"
        ) from error
    function: Any = getattr(module, name, None)
    if function is None:
        raise ConfigError(f"reward.function={path}: {place} has no {name}")
    if not callable(function):
        raise ConfigError(f"reward.function={path}: {name} is a {type(function).__name__}, not a function")
    checked: Callable[[list[Rollout]], Sequence[float]] = function
    return checked


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
