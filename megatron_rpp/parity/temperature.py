"""Which temperature of the trainer explains the engine's log-probs best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpp.algorithm.masked import masked_sum
from megatron_rpp.config.schema import Config
from megatron_rpp.engine.heads import LogprobHead
from megatron_rpp.engine.pipeline import run_pipeline
from megatron_rpp.engine.score import logprob_head
from megatron_rpp.experience.packing import Microbatch
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import Model
from megatron_rpp.parity.evidence import TemperatureFit

_STEPS = 8  # to each side of the best one known
_OCTAVES = (1 / 4, 1 / 32, 1 / 256)  # of a step, from a first grid that reaches to a quarter and to four times


@dataclass(frozen=True)
class TemperaturesHead:
    """Log-probs of the response tokens at several temperatures, from one forward pass."""

    heads: tuple[LogprobHead, ...]

    def __call__(self, logits: Tensor, micro: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        return logits.new_zeros(()), {str(i): head.logprobs(logits, micro)[0] for i, head in enumerate(self.heads)}


def logprobs_at(batch: ExperienceBatch, policy: Model, config: Config, temperatures: Sequence[float]) -> list[Tensor]:
    """The trainer's log-probs [B, S] of the response tokens at each temperature. A collective over the whole job."""
    head = TemperaturesHead(tuple(logprob_head(policy, config, t) for t in temperatures))
    with torch.no_grad():
        found = run_pipeline(policy, batch, head, train=config.train, forward_only=True)
    return [found[str(i)][:, : batch.tokens.shape[1]] for i in range(len(temperatures))]


def errors(found: Sequence[Tensor], batch: ExperienceBatch) -> list[float]:
    """Sum of |trainer - engine| over the response tokens for each of `found` [B, S]."""
    return [float(masked_sum((x - batch.rollout_logprobs).abs().double(), batch.loss_mask)) for x in found]


def fit_temperature(configured: float, error_at: Callable[[Sequence[float]], Sequence[float]]) -> TemperatureFit:
    """The best temperature to 0.2 percent, and the error there and as configured.

    1 is tried too, however far it is: servers may report it whatever they sample at.

    Args:
        error_at: the mean |trainer - engine| at each of some temperatures.
    """
    known = dict(zip((configured, 1.0), error_at((configured, 1.0)), strict=True))
    best = configured
    for octaves in _OCTAVES:
        grid = [best * 2.0 ** (octaves * k) for k in range(-_STEPS, _STEPS + 1)]
        known = dict(zip(grid, error_at(grid), strict=True)) | known
        best = min(known, key=lambda t: (known[t], abs(t - configured)))
    return TemperatureFit(configured, known[configured], best, known[best])
