"""What is known about a mismatch: plain numbers, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ContextCheck:
    """The prompts that the engine sampled from, against those trained on; counts of responses."""

    known: int = 0  # the engine told its prompt ids
    unknown: int = 0  # it did not
    different: int = 0  # of the known
    example: str = ""  # of a difference
    retokenized: int = 0  # prompts of which the text was tokenized again
    retokenized_otherwise: int = 0  # and gave other ids than those trained on
    responses_otherwise: int = 0  # responses whose text tokenizes to other ids; often no fault


def merged_checks(parts: Iterable[ContextCheck]) -> ContextCheck:
    """The checks of several replicas together, with the first example."""
    total = ContextCheck()
    for part in parts:
        total = ContextCheck(
            total.known + part.known,
            total.unknown + part.unknown,
            total.different + part.different,
            total.example or part.example,
            total.retokenized + part.retokenized,
            total.retokenized_otherwise + part.retokenized_otherwise,
            total.responses_otherwise + part.responses_otherwise,
        )
    return total


@dataclass(frozen=True)
class TemperatureFit:
    """Mean |trainer - engine| of the chosen responses, the trainer at the configured and at the best temperature."""

    configured: float
    error: float
    best: float
    best_error: float

    @property
    def explains(self) -> bool:
        """Another temperature takes away more than half of the difference."""
        return self.best_error < 0.5 * self.error and abs(math.log(self.best / self.configured)) > 0.02


@dataclass(frozen=True)
class Rescored:
    """One server's log-probs at temperature 1 of the trainer's own tokens, against the trainer's."""

    d: float  # sum of |trainer - server|
    tokens: float

    @property
    def mean(self) -> float:
        return self.d / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Evidence:
    """All that the diagnosis looks at. Means are in nats a token."""

    mean: float  # |trainer - engine| over all response tokens of the step
    correlation: float  # of that with the position in the sequence
    slope: float  # its growth over 100 tokens
    stale: tuple[str, ...] | None  # a line for each server whose tensors are not the trainer's; None: not compared
    context: ContextCheck
    fit: TemperatureFit
    servers: Mapping[str, Rescored]  # by URL; without those that did not answer
    bias: float = 0.0  # |mean of -log-prob - entropy|, 0 where it may be chance
    top_p: float = 1.0
    notes: tuple[str, ...] = field(default=())  # what could not be found out, and why
