"""How far the trainer's log-probs are from the engine's: sums that add up over replicas."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from megatron_rpp.algorithm.kl import kl_estimate
from megatron_rpp.algorithm.masked import masked_sum

_SURE = 6.0  # standard deviations
_KL_CLAMP = 20.0  # of a log-ratio, before exp


@dataclass(frozen=True)
class Mismatch:
    """Sums over response tokens; d = |trainer - engine| in nats, x = a token's position in its sequence."""

    tokens: float = 0.0
    d: float = 0.0
    kl: float = 0.0  # k3 estimates of KL(engine || trainer)
    surprise: float = 0.0  # s, surprisal above entropy: -engine log-prob - trainer entropy
    surprise_squares: float = 0.0
    x: float = 0.0
    xx: float = 0.0
    xd: float = 0.0
    dd: float = 0.0
    largest: float = 0.0  # the largest d, no sum

    @property
    def mean(self) -> float:
        """Mean absolute difference; 0 without tokens."""
        return self.d / self.tokens if self.tokens else 0.0

    @property
    def mean_surprise(self) -> float:
        """Mean surprisal above entropy, near 0 where the engine samples as it says; 0 without tokens."""
        return self.surprise / self.tokens if self.tokens else 0.0

    def bias(self) -> float:
        """|mean of s| where it cannot be chance, else 0; in nats a token.

        Whatever came before, a token sampled from the distribution whose entropy is taken has s of mean 0. So sum
        and squares give a z-score, although tokens depend on one another.
        """
        if not self.tokens or not abs(self.surprise) > _SURE * math.sqrt(self.surprise_squares):
            return 0.0
        return abs(self.surprise) / self.tokens

    def growth(self) -> tuple[float, float]:
        """(correlation of d with x in [-1, 1], slope of d in nats per 100 tokens); zeros where x or d is constant."""
        if not self.tokens:
            return 0.0, 0.0
        x, d = self.x / self.tokens, self.d / self.tokens
        spread_x, spread_d = self.xx / self.tokens - x * x, self.dd / self.tokens - d * d
        together = self.xd / self.tokens - x * d
        if not (spread_x > 1e-12 and spread_d > 1e-12):
            return 0.0, 0.0
        return together / math.sqrt(spread_x * spread_d), 100 * together / spread_x

    def metrics(self) -> dict[str, float]:
        """mismatch/...; nothing without tokens."""
        if not self.tokens:
            return {}
        return {
            "mismatch/logprob_abs_mean": self.mean,
            "mismatch/logprob_abs_max": self.largest,
            "mismatch/kl": self.kl / self.tokens,
            "mismatch/surprise": self.mean_surprise,
        }


def measure(trainer: Tensor, engine: Tensor, loss_mask: Tensor, entropy: Tensor | None = None) -> Mismatch:
    """The mismatch of one replica's response tokens.

    Args:
        trainer, engine: [B, S] log-probs of the sampled tokens; outside loss_mask anything may stand.
        loss_mask: [B, S], 1 on response tokens.
        entropy: [B, S] of the trainer's distributions; None leaves the surprisal above it at 0.
    """
    engine, trainer = engine.double(), trainer.double()
    d = (trainer - engine).abs()
    x = torch.arange(d.shape[1], dtype=torch.float64, device=d.device).expand_as(d)
    kl = kl_estimate(engine, trainer, "k3", clamp=_KL_CLAMP)
    surprise = torch.zeros_like(d) if entropy is None else -engine - entropy.double()
    sums = [
        masked_sum(each, loss_mask)
        for each in (torch.ones_like(d), d, kl, surprise, surprise**2, x, x * x, x * d, d * d)
    ]
    largest = torch.cat([d[loss_mask != 0], d.new_zeros(1)]).amax()  # a replica may have no row
    return Mismatch(*torch.stack([*sums, largest]).tolist())


def merged(parts: Iterable[Mismatch]) -> Mismatch:
    """The mismatch of several replicas together."""
    columns = list(zip(*[astuple(Mismatch()), *map(astuple, parts)], strict=True))
    return replace(Mismatch(*map(sum, columns)), largest=max(columns[-1]))


def worst_rows(trainer: Tensor, engine: Tensor, loss_mask: Tensor, count: int) -> list[int]:
    """Up to `count` rows of [B, S], those with the largest mean difference first; one at least, if there is any."""
    d = (trainer - engine).double().abs().masked_fill(loss_mask == 0, 0.0)
    means = (d.sum(dim=1) / loss_mask.sum(dim=1).clamp(min=1)).nan_to_num(nan=math.inf)
    rows: list[int] = means.argsort(descending=True, stable=True)[: max(count, 1)].tolist()
    return rows
