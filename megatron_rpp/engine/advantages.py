"""Advantages of the global batch: local math on the last pipeline stage, statistics over every replica."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_rpp.algorithm.advantages import compute_advantages
from megatron_rpp.algorithm.kl import reward_kl
from megatron_rpp.algorithm.masked import ReduceSum, global_moments
from megatron_rpp.algorithm.shaping import (
    RunningMoments,
    adapted_kl_coef,
    group_normalized,
    reward_moments,
    soft_overlong_penalty,
)
from megatron_rpp.config.schema import AlgorithmConfig, Config
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.parallel.collectives import share_tensors, sum_over
from megatron_rpp.parallel.context import ParallelContext


@dataclass(frozen=True)
class ShapingState:
    """What shaping carries from step to step, and a checkpoint keeps. The same on every rank."""

    kl_coef: float
    rewards: RunningMoments

    @classmethod
    def start(cls, algorithm: AlgorithmConfig) -> ShapingState:
        """Before the first step."""
        return cls(algorithm.kl_coef, RunningMoments())

    @classmethod
    def resume(cls, saved: dict[str, Any], algorithm: AlgorithmConfig) -> ShapingState:
        """From `asdict` of a checkpoint's; a kl_coef that no controller moves is the present configuration's."""
        kl_coef = saved["kl_coef"] if algorithm.kl_target else algorithm.kl_coef
        return cls(kl_coef, RunningMoments(**saved["rewards"]))


def add_advantages(
    batch: ExperienceBatch, config: Config, parallel: ParallelContext, state: ShapingState
) -> tuple[ExperienceBatch, ShapingState, dict[str, float]]:
    """(`batch`, scored, with advantages [B, S]; the next step's state; metrics).

    The metrics are advantage/mean and advantage/std after normalization, reward/shaped_mean, the mean of what
    the estimator was given, and kl/coef. A collective over the whole job; a replica without response tokens
    takes part.
    """
    on_last = _compute(batch, config, sum_over(parallel.dp_group), state) if parallel.is_last_stage else None
    shared = share_tensors(parallel.pp_group, on_last, parallel.pp_size - 1, parallel.device)
    kl_coef, count, mean, squares, *metrics = shared["scalars"].tolist()
    names = ("advantage/mean", "advantage/std", "reward/shaped_mean")
    following = ShapingState(kl_coef, RunningMoments(count, mean, squares))
    found = {**dict(zip(names, metrics, strict=True)), "kl/coef": state.kl_coef}
    return replace(batch, advantages=shared["advantages"]), following, found


def _compute(batch: ExperienceBatch, config: Config, reduce_sum: ReduceSum, state: ShapingState) -> dict[str, Tensor]:
    """The advantages, and as `scalars` the next state followed by the metrics."""
    assert batch.old_logprobs is not None and batch.ref_logprobs is not None, "score the batch first"
    algorithm = config.algorithm
    rewards, running = shaped_rewards(batch, config, reduce_sum, state.rewards)
    kl = reward_kl(batch.old_logprobs, batch.ref_logprobs, algorithm)
    advantages = compute_advantages(
        rewards,
        kl,
        batch.loss_mask,
        batch.group_ids,
        preset=algorithm,
        reduce_sum=reduce_sum,
        greedy_rewards=batch.greedy_rewards,
        kl_coef=state.kl_coef,
    )
    after = global_moments(advantages, batch.loss_mask, reduce_sum)
    given = reward_moments(rewards, reduce_sum)
    mean_kl = float(global_moments(kl, batch.loss_mask, reduce_sum).mean)
    kl_coef = adapted_kl_coef(state.kl_coef, mean_kl, algorithm.kl_target, algorithm.kl_horizon, float(given.count))
    known = torch.tensor([kl_coef, running.count, running.mean, running.squares], dtype=torch.float64)
    metrics = torch.stack([after.mean, after.variance.sqrt(), given.mean])
    return {"advantages": advantages.float(), "scalars": torch.cat([known.to(metrics.device), metrics])}


def shaped_rewards(
    batch: ExperienceBatch, config: Config, reduce_sum: ReduceSum, running: RunningMoments
) -> tuple[Tensor, RunningMoments]:
    """(rewards [B] float64 as the estimator is given them, `running` with this batch): penalty, then normalization."""
    reward = config.reward
    rewards = batch.rewards.double() + soft_overlong_penalty(
        batch.loss_mask.sum(dim=1),
        config.rollout.max_response_tokens,
        reward.overlong_buffer_tokens,
        reward.overlong_penalty,
    )
    if reward.normalization == "group":
        return group_normalized(rewards, batch.group_ids, reduce_sum), running
    if reward.normalization == "running":
        running = running.merged(reward_moments(rewards, reduce_sum))
        return running.normalize(rewards), running
    return rewards, running
