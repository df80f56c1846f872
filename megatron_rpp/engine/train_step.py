"""Optimizer steps on one rollout batch."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from megatron_rpp.config.schema import AlgorithmConfig, Config
from megatron_rpp.engine.heads import Head, PolicyHead
from megatron_rpp.engine.optimizer import Optimizer
from megatron_rpp.engine.pipeline import run_pipeline
from megatron_rpp.engine.score import logprob_head
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import Model
from megatron_rpp.parallel.collectives import sum_over


def train_step(policy: Model, optimizer: Optimizer, batch: ExperienceBatch, config: Config) -> dict[str, float]:
    """All mini-batches of one rollout batch; train.batch_size responses an optimizer step.

    A mini-batch takes the same share of rows from every replica, in order; one without any response token
    changes nothing and is passed over.

    Returns:
        Token means over the whole rollout batch, with the mean gradient norm and the first learning rate.
        `ratio/mean` is that of the first mini-batch alone, before any update: 1, or scoring and training
        disagree. `ratio/mean_all` is over all of them.
    """
    rows, lr = config.train.batch_size // policy.parallel.dp_size, optimizer.lr
    algorithm = _with_loss_constant(config)
    logprobs = logprob_head(policy, config, config.rollout.temperature)
    all_sums, counts, norms = [], [], []
    for start in range(0, len(batch), rows):
        mini = batch.rows(torch.arange(start, min(start + rows, len(batch)), device=policy.parallel.device))
        count, sequences = global_counts(mini, policy)
        if count > 0:
            head = PolicyHead(logprobs, algorithm, count, sequences)
            sums, norm = optimizer_step(policy, optimizer, mini, head, config.train.micro_batch_size)
            all_sums.append(sums)
            counts.append(count)
            norms.append(norm)
    if not counts:
        raise ValueError("no response of this step has a token; look at its rollouts and at the stop tokens")
    means = {name: sum(sums[name] for sums in all_sums) / sum(counts) for name in all_sums[0]}
    return {
        **means,
        "ratio/mean": all_sums[0]["ratio/mean"] / counts[0],
        "ratio/mean_all": means["ratio/mean"],
        "grad_norm": sum(norms) / len(norms),
        "lr": lr,
    }


def optimizer_step(
    model: Model, optimizer: Optimizer, batch: ExperienceBatch, head: Head, micro_batch_size: int
) -> tuple[dict[str, float], float]:
    """One forward, backward and update: (the head's scalars summed over all replicas, gradient norm).

    Raises FloatingPointError on every rank where the gradient is not finite. Without a loss scaler
    Megatron's `step` has then already spoilt the weights in memory, but nothing has been synced or saved.
    """
    for chunk in model.chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    optimizer.megatron.zero_grad()
    outputs = run_pipeline(model, batch, head, micro_batch_size=micro_batch_size, forward_only=False)
    updated, norm, _ = optimizer.megatron.step()
    if not updated or not math.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm}; lower optimizer.lr or look at the last rollouts")
    optimizer.schedule.step(increment=1)
    sums = sum_over(model.parallel.dp_group)(torch.stack([v.double() for v in outputs.values()]))
    return dict(zip(outputs, sums.tolist(), strict=True)), float(norm)


def global_counts(batch: ExperienceBatch, model: Model) -> tuple[float, float]:
    """(response tokens, responses with a token) of `batch` over all replicas: what a step's loss is divided by."""
    lengths: Tensor = batch.loss_mask.double().sum(dim=1)
    local = torch.stack([lengths.sum(), (lengths > 0).double().sum()])
    tokens, sequences = sum_over(model.parallel.dp_group)(local).tolist()
    return tokens, sequences


def _with_loss_constant(config: Config) -> AlgorithmConfig:
    """The algorithm's settings, with the constant of the aggregation `constant` filled in."""
    constant = config.algorithm.loss_constant or config.rollout.max_response_tokens
    return replace(config.algorithm, loss_constant=constant)
