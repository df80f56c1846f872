"""What may be done to rewards before the estimator, and to kl_coef between steps. Each is off by default."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpp.algorithm.groups import group_moments
from megatron_rpp.algorithm.masked import MIN_VARIANCE, Moments, ReduceSum, global_moments

_MAX_KL_ERROR = 0.2  # arXiv 1909.08593, equation 5


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of all rewards so far."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def merged(self, new: Moments) -> RunningMoments:
        """With the rewards of one more batch (Chan, Golub, LeVeque 1983)."""
        count, mean = float(new.count), float(new.mean)
        total = self.count + count
        if total == 0:
            return self
        delta = mean - self.mean
        squares = self.squares + float(new.variance) * count + delta**2 * self.count * count / total
        return RunningMoments(total, self.mean + delta * count / total, squares)

    def normalize(self, rewards: Tensor) -> Tensor:
        """(rewards - mean) / max(standard deviation, 1e-4), [B] float64."""
        variance = self.squares / max(self.count, 1.0)
        return (rewards.double() - self.mean) / max(variance, MIN_VARIANCE) ** 0.5


def reward_moments(rewards: Tensor, reduce_sum: ReduceSum) -> Moments:
    """Moments of rewards [B] over the global batch, scalars."""
    return global_moments(rewards, torch.ones_like(rewards), reduce_sum)


def group_normalized(rewards: Tensor, group_ids: Tensor, reduce_sum: ReduceSum) -> Tensor:
    """(rewards - mean of the group) / max(its standard deviation, 1e-4), [B] float64; 0 for equal rewards."""
    group = group_moments(rewards, group_ids, reduce_sum)
    return group.deviation(rewards) / group.variance.clamp(min=MIN_VARIANCE).sqrt()


def soft_overlong_penalty(lengths: Tensor, max_tokens: int, buffer_tokens: int, penalty: float) -> Tensor:
    """What is added to the reward of a response by its length (DAPO, arXiv 2503.14476, equation 13).

    Args:
        lengths: [B] response tokens.
        max_tokens: longest response.
        buffer_tokens: the penalty grows linearly over this many tokens before max_tokens; 0 turns it off.
        penalty: at max_tokens.

    Returns:
        [B] float64: 0 up to max_tokens - buffer_tokens, -penalty at max_tokens.
    """
    if buffer_tokens == 0:
        return torch.zeros_like(lengths, dtype=torch.float64)
    excess = lengths.double() - (max_tokens - buffer_tokens)
    return -penalty * (excess / buffer_tokens).clamp(0.0, 1.0)


def adapted_kl_coef(kl_coef: float, mean_kl: float, target: float, horizon: int, responses: float) -> float:
    """kl_coef after a batch of `responses` whose mean KL was `mean_kl` (arXiv 1909.08593, section 2.2).

    It moves towards the target by at most 20 % of responses / horizon, and never by more than 20 %; target 0
    leaves it.
    """
    if target == 0:
        return kl_coef
    error = min(max(mean_kl / target - 1.0, -_MAX_KL_ERROR), _MAX_KL_ERROR)
    return kl_coef * (1.0 + error * min(responses / horizon, 1.0))
