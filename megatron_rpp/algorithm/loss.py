"""The clipped policy loss, summed over tokens and divided once by the global token count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rpp.algorithm.masked import masked_sum


@dataclass(frozen=True)
class PolicyLoss:
    """A differentiable loss and the sums its metrics are made of (divide each by the token count)."""

    loss: Tensor  # scalar with gradient
    sums: dict[str, Tensor]  # float64 scalars: sums over response tokens


def policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    global_token_count: float,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    log_ratio_clamp: float = 20.0,
) -> PolicyLoss:
    """PPO-clip (arXiv 1707.06347, equation 7) with token-mean aggregation.

    Args:
        policy_logprobs: [B, S] with gradient.
        old_logprobs, advantages, loss_mask: [B, S] without.
        global_token_count: response tokens of the whole optimizer step, over every rank and microbatch;
            the sum of the losses of all microbatches is then the token mean.
    """
    mask = loss_mask != 0
    log_ratio = (policy_logprobs - old_logprobs).masked_fill(~mask, 0.0).clamp(-log_ratio_clamp, log_ratio_clamp)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high)
    per_token = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    is_clipped = clipped_ratio * advantages < ratio * advantages
    loss = masked_sum(per_token, loss_mask) / global_token_count
    with torch.no_grad():
        sums = {
            "loss/policy": masked_sum(per_token.double(), loss_mask),
            "ratio/mean": masked_sum(ratio.double(), loss_mask),
            "clip/fraction": masked_sum(is_clipped.double(), loss_mask),
        }
    return PolicyLoss(loss, sums)
