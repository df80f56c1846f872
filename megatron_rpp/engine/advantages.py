"""Advantages of the global batch: local math on the last pipeline stage, statistics over every replica."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_rpp.algorithm.advantages import compute_advantages
from megatron_rpp.algorithm.kl import reward_kl
from megatron_rpp.algorithm.masked import ReduceSum, global_moments, masked_sum
from megatron_rpp.algorithm.shaping import (
    RunningMoments,
    adapted_kl_coef,
    group_normalized,
    reward_moments,
    soft_overlong_penalty,
)
from megatron_rpp.config.schema import Config
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.parallel.collectives import share_tensors, sum_over
from megatron_rpp.parallel.context import ParallelContext


@dataclass(frozen=True)
class ShapingState:
    """What shaping carries from step to step, and a checkpoint keeps. The same on every rank."""

    kl_coef: float | None = None  # as the adaptive controller left it; None: the configuration's
    rewards: RunningMoments = RunningMoments()  # noqa: RUF009 - frozen

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> ShapingState:
        """From what `asdict` made of one, or from nothing."""
        return cls(saved["kl_coef"], RunningMoments(**saved["rewards"])) if saved else cls()


def add_advantages(
    batch: ExperienceBatch, config: Config, parallel: ParallelContext, state: ShapingState
) -> tuple[ExperienceBatch, ShapingState, dict[str, float]]:
    """(`batch`, scored, with advantages [B, S]; the next step's state; metrics).

    The metrics are advantage/mean and advantage/std after normalization, reward/shaped_mean, the mean of what
    the estimator was given, and with a reference kl/mean and kl/coef. A collective over the whole job; a
    replica without response tokens takes part.
    """
    algorithm = config.algorithm
    kl_coef = algorithm.kl_coef if state.kl_coef is None or not algorithm.kl_target else state.kl_coef
    on_last = (
        _compute(batch, config, kl_coef, state.rewards, sum_over(parallel.dp_group)) if parallel.is_last_stage else None
    )
    shared = share_tensors(parallel.pp_group, on_last, parallel.pp_size - 1, parallel.device)
    mean, std, shaped, mean_kl, responses, *moments = shared["scalars"].tolist()
    metrics = {"advantage/mean": mean, "advantage/std": std, "reward/shaped_mean": shaped}
    if algorithm.uses_reference:
        metrics |= {"kl/mean": mean_kl, "kl/coef": kl_coef}
    following = ShapingState(rewards=RunningMoments(*moments))
    if algorithm.kl_target:
        adapted = adapted_kl_coef(kl_coef, mean_kl, algorithm.kl_target, algorithm.kl_horizon, responses)
        following = replace(following, kl_coef=adapted)
    return replace(batch, advantages=shared["advantages"]), following, metrics


def _compute(
    batch: ExperienceBatch, config: Config, kl_coef: float, running: RunningMoments, reduce_sum: ReduceSum
) -> dict[str, Tensor]:
    """The advantages, and as `scalars`: their mean and deviation, mean reward, mean KL, responses, running moments."""
    assert batch.old_logprobs is not None, "score the batch first"
    algorithm, mask = config.algorithm, batch.loss_mask
    rewards, running = shaped_rewards(batch, config, reduce_sum, running)
    kl = torch.zeros_like(batch.old_logprobs)
    if batch.ref_logprobs is not None:
        kl = reward_kl(batch.old_logprobs, batch.ref_logprobs, preset=algorithm)
    advantages = compute_advantages(
        rewards,
        kl,
        mask,
        batch.group_ids,
        preset=algorithm,
        reduce_sum=reduce_sum,
        greedy_rewards=batch.greedy_rewards,
        kl_coef=kl_coef,
    )
    after = global_moments(advantages, mask, reduce_sum)
    local = [rewards.sum(), masked_sum(kl.double(), mask), rewards.new_tensor(float(len(batch)))]
    total_reward, total_kl, responses = reduce_sum(torch.stack(local))
    scalars = [after.mean, after.variance.sqrt(), total_reward / responses, total_kl / after.count.clamp(min=1.0)]
    known = rewards.new_tensor([running.count, running.mean, running.squares])
    return {"advantages": advantages.float(), "scalars": torch.cat([torch.stack([*scalars, responses]), known])}


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
