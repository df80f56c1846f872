"""Optimizer steps on one rollout batch."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpp.config.schema import Config
from megatron_rpp.engine.heads import Head, PolicyHead
from megatron_rpp.engine.optimizer import Optimizer
from megatron_rpp.engine.pipeline import run_pipeline
from megatron_rpp.engine.score import logprob_head
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import Model
from megatron_rpp.parallel.collectives import sum_over


def train_step(policy: Model, optimizer: Optimizer, batch: ExperienceBatch, config: Config) -> dict[str, float]:
    """All mini-batches of one rollout batch; train.batch_size responses an optimizer step.

    A mini-batch takes the same share of rows from every replica, in order.

    Returns:
        Token means over the whole rollout batch, with the mean gradient norm and the first learning rate.
        `ratio/mean` is that of the first mini-batch alone, before any update: 1, or scoring and training
        disagree. `ratio/mean_all` is over all of them.
    """
    rows = config.train.batch_size // policy.parallel.dp_size
    totals: dict[str, float] = {}
    norms, tokens, first_ratio, lr = [], 0.0, 1.0, optimizer.lr
    for start in range(0, len(batch), rows):
        mini = batch.rows(torch.arange(start, min(start + rows, len(batch)), device=policy.parallel.device))
        count = global_token_count(mini, policy)
        head = PolicyHead(logprob_head(policy, config, config.rollout.temperature), config.algorithm, max(count, 1.0))
        sums, norm = optimizer_step(policy, optimizer, mini, head, config.train.micro_batch_size)
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value
        if start == 0:
            first_ratio = sums["ratio/mean"] / max(count, 1.0)
        norms.append(norm)
        tokens += count
    means = {name: value / max(tokens, 1.0) for name, value in totals.items()}
    return {
        **means,
        "loss/total": means["loss/policy"],
        "ratio/mean": first_ratio,
        "ratio/mean_all": means["ratio/mean"],
        "grad_norm": sum(norms) / len(norms),
        "lr": lr,
    }


def optimizer_step(
    model: Model, optimizer: Optimizer, batch: ExperienceBatch, head: Head, micro_batch_size: int
) -> tuple[dict[str, float], float]:
    """One forward, backward and update: (the head's scalars summed over all replicas, gradient norm)."""
    for chunk in model.chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    optimizer.megatron.zero_grad()
    outputs = run_pipeline(model, batch, head, micro_batch_size=micro_batch_size, forward_only=False)
    updated, norm, _ = optimizer.megatron.step()
    if not updated:
        raise FloatingPointError("the gradient is not finite; lower optimizer.lr or look at the last rollouts")
    optimizer.schedule.step(increment=1)
    sums = sum_over(model.parallel.dp_group)(torch.stack([v.double() for v in outputs.values()]))
    return dict(zip(outputs, sums.tolist(), strict=True)), float(norm or 0.0)


def global_token_count(batch: ExperienceBatch, model: Model) -> float:
    """Response tokens of `batch` over all replicas: the one denominator of an optimizer step."""
    count: Tensor = batch.loss_mask.double().sum()
    return float(sum_over(model.parallel.dp_group)(count))
