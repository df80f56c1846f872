"""What the loop asks of a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from megatron_rpp.experience.types import Rollout


class Reward(Protocol):
    """Scores responses; it never raises because of what a response says."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One reward for each rollout, in order."""
        ...

    def close(self) -> None:
        """Ends the worker processes, if any were started."""
        ...
