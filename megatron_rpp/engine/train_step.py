"""Optimizer steps on one rollout batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megatron_rpp.config.schema import AlgorithmConfig, Config, TrainConfig
from megatron_rpp.engine.fp8_scales import settle_gradient_scales
from megatron_rpp.engine.heads import ALL_POSITIONS, REAL_POSITIONS, Head, PolicyHead
from megatron_rpp.engine.optimizer import Optimizer
from megatron_rpp.engine.overlap import finish_param_gather
from megatron_rpp.engine.pipeline import run_pipeline
from megatron_rpp.engine.score import logprob_head
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import Model
from megatron_rpp.parallel.collectives import max_over, sum_over


def train_step(policy: Model, optimizer: Optimizer, batch: ExperienceBatch, config: Config) -> dict[str, float]:
    """All mini-batches of one rollout batch, about train.batch_size responses an optimizer step.

    `batch.minibatch_ids` says which rows are whose. Without them a mini-batch takes the same share of rows from
    every replica, in order. One without any response token changes nothing and is passed over.

    Returns:
        Token means over the whole rollout batch, with the mean gradient norm and the first learning rate.
        `ratio/mean` is that of the first mini-batch alone, before any update: 1, or scoring and training
        disagree. `ratio/mean_all` is over all of them. `train/padding_waste` is the part of the positions that the
        model ran over, on all replicas, that held no token.
    """
    lr = optimizer.lr
    algorithm = _with_loss_constant(config)
    logprobs = logprob_head(policy, config, config.rollout.temperature)
    all_sums, counts, norms = [], [], []
    for mini in _minibatches(batch, policy, config.train.batch_size):
        count, sequences = global_counts(mini, policy)
        if count > 0:
            head = PolicyHead(logprobs, algorithm, count, sequences)
            sums, norm = optimizer_step(policy, optimizer, mini, head, config.train)
            all_sums.append(sums)
            counts.append(count)
            norms.append(norm)
    finish_param_gather(policy)
    if not counts:
        raise ValueError("no response of this step has a token; look at its rollouts and at the stop tokens")
    real, run = (sum(sums.pop(name) for sums in all_sums) for name in (REAL_POSITIONS, ALL_POSITIONS))
    means = {name: sum(sums[name] for sums in all_sums) / sum(counts) for name in all_sums[0]}
    return {
        **means,
        "ratio/mean": all_sums[0]["ratio/mean"] / counts[0],
        "ratio/mean_all": means["ratio/mean"],
        "train/padding_waste": 1.0 - real / run,
        "grad_norm": sum(norms) / len(norms),
        "lr": lr,
    }


def _minibatches(batch: ExperienceBatch, policy: Model, batch_size: int) -> Iterator[ExperienceBatch]:
    """This replica's rows of each mini-batch, equally many mini-batches on every rank."""
    if batch.minibatch_ids is None:
        rows = batch_size // policy.parallel.dp_size
        for start in range(0, len(batch), rows):
            yield batch.rows(torch.arange(start, min(start + rows, len(batch)), device=policy.parallel.device))
        return
    # A replica may have no row of the last one, or of any.
    none = batch.minibatch_ids.new_full((1,), -1)
    last = max_over(policy.parallel.dp_group)(torch.cat([batch.minibatch_ids, none]).max())
    for minibatch in range(int(last) + 1):
        yield batch.rows((batch.minibatch_ids == minibatch).nonzero()[:, 0])


def optimizer_step(
    model: Model, optimizer: Optimizer, batch: ExperienceBatch, head: Head, train: TrainConfig
) -> tuple[dict[str, float], float]:
    """One forward, backward and update: (the head's scalars summed over all replicas, gradient norm).

    `train` says how the batch is cut into microbatches. Before a model's first step passes that give its gradients
    FP8 scales may be run and thrown away (`fp8_scales`).

    Raises FloatingPointError on every rank where the gradient is not finite. Without a loss scaler
    Megatron's `step` has then already spoilt the weights in memory, but nothing has been synced or saved.
    """

    def forward_backward() -> dict[str, Tensor]:
        for chunk in model.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        optimizer.megatron.zero_grad()
        return run_pipeline(model, batch, head, train=train, forward_only=False)

    settle_gradient_scales(model, forward_backward)
    outputs = forward_backward()
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
