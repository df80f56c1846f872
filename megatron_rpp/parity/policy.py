"""What a mismatch leads to: nothing, a warning, a correction, or the end of the run."""

from __future__ import annotations

from dataclasses import replace
from enum import IntEnum

from megatron_rpp.config.schema import Config, ParityConfig
from megatron_rpp.parity.measure import Mismatch


class Level(IntEnum):
    """Each includes those below it."""

    FINE = 0
    WARN = 1
    CORRECT = 2
    STOP = 3


class ParityError(RuntimeError):
    """Trainer and engine differ by more than parity.stop; says the cause."""


def level_of(mismatch: Mismatch, limits: ParityConfig, top_p: float = 1.0) -> Level:
    """The highest level whose threshold the mean difference is above; NaN is above all that are not 0.

    Tokens that were not sampled as their log-probs say, where these are right, lead to a warning at most:
    importance weights could not correct that.
    """
    mean = mismatch.mean
    for level, limit in ((Level.STOP, limits.stop), (Level.CORRECT, limits.correct), (Level.WARN, limits.warn)):
        if limit and not mean <= limit:
            return level
    is_biased = limits.warn and is_sampled_otherwise(mismatch, top_p, limits.warn)
    return Level.WARN if is_biased else Level.FINE


def is_sampled_otherwise(mismatch: Mismatch, top_p: float, least: float = 0.0) -> bool:
    """Whether the bias is above `least` and more than the differences of log-probs can make.

    Never where `top_p` is below 1: there it is what the user asked for.
    """
    return top_p == 1 and mismatch.bias() > max(least, 3 * mismatch.mean)


def corrected(config: Config) -> Config:
    """`config` with truncated importance weights, unless it has a correction already."""
    if config.algorithm.importance_correction != "off":
        return config
    return replace(config, algorithm=replace(config.algorithm, importance_correction="truncated"))
