"""Advantages of REINFORCE++ (arXiv 2501.03262), its baseline variant, GRPO, Dr. GRPO, RLOO and ReMax.

scores -> minus baseline -> returns with the KL penalty -> one global normalization (REINFORCE++ only)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_rpp.algorithm.groups import group_moments
from megatron_rpp.algorithm.masked import ReduceSum, global_moments, whiten
from megatron_rpp.algorithm.returns import discounted_returns, token_rewards
from megatron_rpp.algorithm.shapes import require_shape
from megatron_rpp.config.presets import algorithm_config
from megatron_rpp.config.schema import AlgorithmConfig

_GRPO_STD_EPS = 1e-6  # added to a group's standard deviation, as verl, slime and NeMo-RL do


def compute_advantages(
    rewards: Tensor,
    kl: Tensor,
    loss_mask: Tensor,
    group_ids: Tensor,
    *,
    preset: str | AlgorithmConfig = "paper",
    reduce_sum: ReduceSum | None = None,
    greedy_rewards: Tensor | None = None,
    **overrides: Any,
) -> Tensor:
    """Advantages [B, S] in float64, 0 where loss_mask is 0.

    Every rank must call it, those without rows or without response tokens too, and gets the values that one
    process with the whole batch would compute.

    Args:
        rewards: [B] one reward a response.
        kl: [B, S] per-token KL estimates (see `kl_estimate`); anything, even NaN, outside the mask.
        loss_mask: [B, S] 1 on response tokens.
        group_ids: [B] int64, equal for the responses to one prompt, which may be on several ranks; from 0 to
            4,194,303, such as the position of the prompt in the batch.
        preset: a name of `config.presets.PRESETS`, or a whole AlgorithmConfig.
        reduce_sum: takes a tensor and returns its sum over the ranks that share the batch, as
            `parallel.collectives.sum_over(group)` does; None for one process.
        greedy_rewards: [B] reward of the greedy response to each row's prompt; for estimator `remax`.
        **overrides: settings of AlgorithmConfig that replace the preset's, such as kl_coef. kl_coef has no
            effect where kl_placement is `none`, gamma only has one for estimator `reinforce_pp`.

    Raises:
        ValueError: an unknown preset or setting, a value that it cannot have, a wrong shape, no greedy_rewards
            for `remax`, group_ids out of range.
    """
    settings = algorithm_config(preset, **overrides)
    rows, columns = loss_mask.shape
    require_shape((rows, columns), kl=kl)
    require_shape((rows,), rewards=rewards, group_ids=group_ids, greedy_rewards=greedy_rewards)
    reduce_sum = reduce_sum or (lambda x: x)
    kl = kl.double().masked_fill(loss_mask == 0, 0.0)
    scores = rewards.double()
    if settings.kl_placement == "folded":
        scores = scores - settings.kl_coef * kl.sum(dim=1)
    scores = _minus_baseline(scores, group_ids, greedy_rewards, settings, reduce_sum)
    if settings.reward_clip:
        scores = scores.clamp(-settings.reward_clip, settings.reward_clip)
    values = _token_values(scores, kl, loss_mask, settings)
    if not settings.estimator.startswith("reinforce_pp"):
        return values
    moments = global_moments(values, loss_mask, reduce_sum)
    return whiten(values, loss_mask, moments, ddof=settings.variance_ddof, floor=settings.variance_floor)


def _minus_baseline(
    scores: Tensor,
    group_ids: Tensor,
    greedy_rewards: Tensor | None,
    settings: AlgorithmConfig,
    reduce_sum: ReduceSum,
) -> Tensor:
    """scores [B] less what the estimator expects of each; float64."""
    if settings.estimator == "reinforce_pp":
        return scores
    if settings.estimator == "remax":
        if greedy_rewards is None:
            raise ValueError("estimator=remax needs greedy_rewards: the reward of each prompt's greedy response")
        return scores - greedy_rewards.double()
    group = group_moments(scores, group_ids, reduce_sum)
    others = (group.count - 1).clamp(min=1.0)
    centered = group.deviation(scores)
    if settings.estimator == "rloo":  # R - mean of the others = n / (n - 1) (R - mean of all)
        centered = centered * group.count / others
    elif settings.estimator == "grpo":
        centered = centered / ((group.variance * group.count / others).sqrt() + _GRPO_STD_EPS)
    lone = scores if settings.lone_sample == "raw" else torch.zeros_like(scores)
    return torch.where(group.count > 1, centered, lone)


def _token_values(scores: Tensor, kl: Tensor, loss_mask: Tensor, settings: AlgorithmConfig) -> Tensor:
    """What each response token is credited with before any normalization, [B, S], 0 outside the mask."""
    if settings.kl_placement == "instant":
        return (scores[:, None] - settings.kl_coef * kl).masked_fill(loss_mask == 0, 0.0)
    kl_coef = settings.kl_coef if settings.kl_placement == "to_go" else 0.0
    gamma = settings.gamma if settings.estimator == "reinforce_pp" else 1.0
    rewards = token_rewards(scores, kl, loss_mask, kl_coef)
    return discounted_returns(rewards, loss_mask, gamma, skip_masked=settings.gamma_skips_masked)
