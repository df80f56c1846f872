"""REINFORCE++ advantages (arXiv 2501.03262): token rewards -> returns -> one global normalization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpp.algorithm.masked import ReduceSum, global_moments, whiten


@dataclass(frozen=True)
class Advantages:
    """Normalized advantages and what they came from."""

    advantages: Tensor  # [B, S] float64, 0 where loss_mask is 0
    mean: Tensor  # global mean of the advantages after normalization, float64 scalar
    std: Tensor  # global standard deviation of the advantages after normalization, float64 scalar


def token_rewards(rewards: Tensor, kl: Tensor, loss_mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = [t is the last response token] * R - kl_coef * kl_t, float64 [B, S], 0 outside the mask.

    Args:
        rewards: [B], one a response.
        kl: [B, S] per-token KL estimates.
        loss_mask: [B, S], 1 on response tokens; a row without any carries no reward.
    """
    per_token = (-kl_coef * kl.double()).masked_fill(loss_mask == 0, 0.0)
    positions = torch.arange(loss_mask.shape[1], device=loss_mask.device)
    last = torch.where(loss_mask != 0, positions, -1).amax(dim=1)  # [B], -1 for an empty row
    has_response = last >= 0
    per_token[has_response, last[has_response]] += rewards.double()[has_response]
    return per_token


def discounted_returns(token_rewards: Tensor, loss_mask: Tensor, gamma: float) -> Tensor:
    """G_t = sum over response tokens u >= t of gamma^(u - t) r_u, float64 [B, S], 0 outside the mask.

    Tokens outside the mask (observations of a multi-turn response) are skipped: they neither reset
    the return nor decay it.
    """
    returns = torch.zeros_like(token_rewards, dtype=torch.float64)
    running = torch.zeros(token_rewards.shape[0], dtype=torch.float64, device=token_rewards.device)
    for t in reversed(range(token_rewards.shape[1])):
        in_response = loss_mask[:, t] != 0
        running = torch.where(in_response, token_rewards[:, t] + gamma * running, running)
        returns[:, t] = running.masked_fill(~in_response, 0.0)
    return returns


def compute_advantages(
    rewards: Tensor,
    kl: Tensor,
    loss_mask: Tensor,
    *,
    kl_coef: float,
    gamma: float = 1.0,
    reduce_sum: ReduceSum | None = None,
) -> Advantages:
    """REINFORCE++ advantages, normalized over every response token of the global batch.

    Args:
        rewards: [B] one reward a response.
        kl: [B, S] per-token KL estimates (see `kl_estimate`).
        loss_mask: [B, S] 1 on response tokens.
        kl_coef: beta, the weight of the KL penalty in the reward.
        gamma: discount from one response token to the next.
        reduce_sum: all-reduce over the ranks that share the batch; None for one process.
    """
    reduce_sum = reduce_sum or (lambda x: x)
    returns = discounted_returns(token_rewards(rewards, kl, loss_mask, kl_coef), loss_mask, gamma)
    _, mean, variance = global_moments(returns, loss_mask, reduce_sum)
    advantages = whiten(returns, loss_mask, mean, variance)
    _, after_mean, after_variance = global_moments(advantages, loss_mask, reduce_sum)
    return Advantages(advantages, after_mean, after_variance.sqrt())
