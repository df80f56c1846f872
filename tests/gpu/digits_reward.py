"""A reward for the colocated loop: of the standard library alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def share_of_digits(rollouts: Sequence[Any]) -> list[float]:
    """0 to 1, of each rollout's text."""
    return [sum(map(str.isdigit, rollout.text)) / max(len(rollout.text), 1) for rollout in rollouts]
