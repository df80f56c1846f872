"""A reward function of the user's: `package.module:name` or `file.py:name`, called in the trainer's process."""

from __future__ import annotations

import importlib
import importlib.util
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

if TYPE_CHECKING:
    from megatron_rpp.experience.types import Rollout


class FunctionReward:
    """What the function at reward.function returns: one finite number for each rollout."""

    def __init__(self, config: RewardConfig) -> None:
        """Raises ConfigError where there is no such function."""
        self._path = config.function
        self._function = load_function(config.function)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Raises RewardError for a result that is no list of rewards; errors of the function pass through."""
        values = self._function(list(rollouts))
        try:
            found = list(values)
        except TypeError as error:
            raise RewardError(f"reward.function={self._path} must return a list, not {values!r:.100}") from error
        if len(found) != len(rollouts):
            raise RewardError(f"reward.function={self._path} gave {len(found)} rewards for {len(rollouts)} responses")
        return [self._number(value) for value in found]

    def metrics(self) -> Metrics:
        return Metrics()

    def close(self) -> None: ...

    def _number(self, value: object) -> float:
        if hasattr(value, "item"):
            value = value.item()  # of a tensor or an array
        if not isinstance(value, Real) or not math.isfinite(value):
            raise RewardError(f"reward.function={self._path} gave {value!r:.100}; a reward must be a finite number")
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
