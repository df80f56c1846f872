"""What is known about a mismatch: plain numbers, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass

from megatron_rpp.parity.measure import Mismatch

_EXPLAINS = 0.5  # of the recorded difference: what a server's own error must make up to be its cause
_MILD = 0.1  # of the mean recorded difference: tokens that differ less accuse no server


@dataclass(frozen=True)
class PromptIdsCheck:
    """The prompts that the engine sampled from, against those trained on; counts of responses."""

    example: str = ""  # of a difference
    known: int = 0  # the engine told its prompt ids
    unknown: int = 0  # it did not
    different: int = 0  # of the known
    retokenized: int = 0  # prompts of which the text was tokenized again
    retokenized_otherwise: int = 0  # and gave other ids than those trained on
    responses_otherwise: int = 0  # responses whose text tokenizes to other ids; often no fault


def merged_checks(parts: Iterable[PromptIdsCheck]) -> PromptIdsCheck:
    """The checks of several replicas together, with the first example."""
    examples, *counts = zip(*[astuple(PromptIdsCheck()), *map(astuple, parts)], strict=True)
    return PromptIdsCheck(next(filter(None, examples), ""), *map(sum, counts))


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
    """What one server says now of tokens that were sampled before, by itself or another one; sums over them."""

    abs_sum: float = 0.0  # |trainer - server|, both at temperature 1
    engine_abs_sum: float = 0.0  # |trainer - engine as recorded|, both at the configured temperature
    tokens: float = 0.0

    @property
    def mean(self) -> float:
        """Mean |trainer - server|; 0 without tokens."""
        return self.abs_sum / self.tokens if self.tokens else 0.0


def added(a: Rescored, b: Rescored) -> Rescored:
    """Both together."""
    return Rescored(a.abs_sum + b.abs_sum, a.engine_abs_sum + b.engine_abs_sum, a.tokens + b.tokens)


def wrong_servers(servers: Mapping[str, Rescored], temperature: float) -> dict[str, float]:
    """The servers whose own error explains what was recorded of the very tokens they scored: URL -> mean error.

    A good server that was given only tokens of its own has rounding as error and as recorded difference; so a
    server's error must also be a part of the mean recorded difference of all scored tokens.

    Args:
        temperature: of what was recorded; an error of the logits is divided by it there.
    """
    tokens = sum(each.tokens for each in servers.values())
    recorded = sum(each.engine_abs_sum for each in servers.values()) / max(tokens, 1.0)
    return {
        url: each.mean
        for url, each in servers.items()  # written so that NaN is wrong
        if not each.abs_sum <= _EXPLAINS * each.engine_abs_sum * temperature
        and not each.mean <= _MILD * recorded * temperature
    }


@dataclass(frozen=True)
class Evidence:
    """All that the diagnosis looks at. Means are in nats a token."""

    mismatch: Mismatch  # over all response tokens of the step
    stale: tuple[str, ...] | None  # a line for each server whose tensors are not the trainer's; None: not compared
    prompt_ids: PromptIdsCheck
    fit: TemperatureFit
    servers: Mapping[str, Rescored]  # by URL; without those that did not answer
    top_p: float = 1.0
    notes: tuple[str, ...] = ()  # what could not be found out, and why
