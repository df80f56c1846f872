"""Advantages of the global batch: local math on the last pipeline stage, statistics over every replica."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megatron_rpp.algorithm.advantages import compute_advantages
from megatron_rpp.algorithm.kl import kl_estimate
from megatron_rpp.config.schema import AlgorithmConfig
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.parallel.collectives import share_tensors, sum_over
from megatron_rpp.parallel.context import ParallelContext


def add_advantages(
    batch: ExperienceBatch, algorithm: AlgorithmConfig, parallel: ParallelContext
) -> tuple[ExperienceBatch, dict[str, float]]:
    """`batch` (scored) with advantages [B, S], and metrics: advantage/mean and advantage/std after normalization.

    A collective over the whole job; a replica without response tokens takes part.
    """
    on_last = _compute(batch, algorithm, parallel) if parallel.is_last_stage else None
    shared = share_tensors(parallel.pp_group, on_last, parallel.pp_size - 1, parallel.device)
    metrics = {"advantage/mean": float(shared["mean"]), "advantage/std": float(shared["std"])}
    return replace(batch, advantages=shared["advantages"]), metrics


def _compute(batch: ExperienceBatch, algorithm: AlgorithmConfig, parallel: ParallelContext) -> dict[str, Tensor]:
    assert batch.old_logprobs is not None and batch.ref_logprobs is not None, "score the batch first"
    kl = kl_estimate(batch.old_logprobs, batch.ref_logprobs, algorithm.kl_estimator, algorithm.kl_clamp)
    result = compute_advantages(
        batch.rewards,
        kl,
        batch.loss_mask,
        kl_coef=algorithm.kl_coef,
        gamma=algorithm.gamma,
        reduce_sum=sum_over(parallel.dp_group),
    )
    return {"advantages": result.advantages.float(), "mean": result.mean, "std": result.std}
