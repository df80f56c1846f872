"""What the loop asks of a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from megatron_rpp.observability.metrics import Metrics

if TYPE_CHECKING:
    from megatron_rpp.experience.types import Rollout


class RewardError(RuntimeError):
    """Responses could not be scored; the message says which service failed, and how."""


class Reward(Protocol):
    """Scores responses; it never raises because of what a response says."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One reward for each rollout, in order."""
        ...

    def metrics(self) -> Metrics:
        """What is worth a line in the step's metrics, since it was last asked for: `Metrics()` where nothing is."""
        ...

    def close(self) -> None:
        """Ends the worker processes, if any were started."""
        ...
