"""Token rewards and returns of REINFORCE++ (arXiv 2501.03262, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, loss_mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = [t is the last response token] * score - kl_coef * kl_t, float64 [B, S], 0 outside the mask.

    Args:
        scores: [B], one a response.
        kl: [B, S] per-token KL estimates.
        loss_mask: [B, S], 1 on response tokens; a row without any carries no score.
    """
    per_token = (-kl_coef * kl.double()).masked_fill(loss_mask == 0, 0.0)
    if loss_mask.shape[1] == 0:
        return per_token
    positions = torch.arange(loss_mask.shape[1], device=loss_mask.device)
    last = torch.where(loss_mask != 0, positions, -1).amax(dim=1)  # [B], -1 for an empty row
    has_response = last >= 0
    per_token[has_response, last[has_response]] += scores.double()[has_response]
    return per_token


def discounted_returns(token_rewards: Tensor, loss_mask: Tensor, gamma: float, *, skip_masked: bool = True) -> Tensor:
    """G_t = sum over response tokens u >= t of gamma^distance r_u, float64 [B, S], 0 outside the mask.

    Tokens outside the mask (observations of a multi-turn response) never reset the return. The distance
    counts response tokens only, or with `skip_masked=False` every token.
    """
    mask = loss_mask != 0
    rewards = token_rewards.double().masked_fill(~mask, 0.0)
    if gamma == 1 or not skip_masked or not _has_holes(mask):
        return _discounted_suffix_sums(rewards, gamma).masked_fill(~mask, 0.0)
    rows, columns = mask.nonzero(as_tuple=True)
    slots = (mask.cumsum(dim=1) - 1)[rows, columns]  # position among the response tokens of its row
    packed = torch.zeros_like(rewards).index_put((rows, slots), rewards[rows, columns])
    returns = _discounted_suffix_sums(packed, gamma)
    return torch.zeros_like(rewards).index_put((rows, columns), returns[rows, slots])


def _has_holes(mask: Tensor) -> bool:
    """Whether a row of the boolean mask [B, S] has more than one run of response tokens."""
    starts = mask[:, 1:] & ~mask[:, :-1]
    return bool((starts.sum(dim=1) + mask[:, :1].sum(dim=1) > 1).any())


def _discounted_suffix_sums(x: Tensor, gamma: float) -> Tensor:
    """y_t = sum over u >= t of gamma^(u - t) x_u along the last dimension, [B, S].

    With a discount by doubling, in log2(S) passes: after the one with stride s, y_t holds u < t + 2s.
    """
    if gamma == 1:
        return x.flip(1).cumsum(1).flip(1)
    y, stride = x.clone(), 1
    while stride < x.shape[1] and gamma**stride > 0:
        y[:, :-stride] += gamma**stride * y[:, stride:]
        stride *= 2
    return y
