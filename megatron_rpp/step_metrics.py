"""The numbers of one step, as metrics.jsonl keeps them."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rpp.algorithm.masked import masked_sum
from megatron_rpp.experience.types import ExperienceBatch, Rollout
from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.parallel.collectives import gather_objects
from megatron_rpp.session import Session


def step_metrics(
    s: Session, batch: ExperienceBatch, rollouts: Sequence[Rollout], known: dict[str, float]
) -> dict[str, float]:
    """All metrics of a step over all replicas: `known` ones as they are, the rest from the scored batch.

    A collective over the whole job. Token means are over response tokens; `tokens_per_second` counts prompt
    and response tokens of all replicas over the whole step.
    """
    local = _replica_metrics(s, batch, rollouts) if s.parallel.is_replica_leader else Metrics()
    local.merge(s.memory.take_metrics())
    reduced = local.reduce(gather_objects)
    values = reduced.as_dict()
    mean = values["reward/mean"]
    values["reward/std"] = max(values.pop("reward/square") - mean**2, 0.0) ** 0.5
    tokens, _ = reduced.means["tokens"]
    values.pop("tokens")
    values |= s.rollout_engine.last_sync.metrics() if s.rollout_engine.last_sync else {}
    times = s.timers.as_metrics()
    rate = tokens / times["time/step"]
    return {"policy_version": values.pop("policy_version"), **values, **known, **times, "tokens_per_second": rate}


def _replica_metrics(s: Session, batch: ExperienceBatch, rollouts: Sequence[Rollout]) -> Metrics:
    assert batch.entropy is not None
    count, mask = len(rollouts), batch.loss_mask
    tokens = float(mask.sum())
    rewards = batch.rewards.double()
    metrics = Metrics()
    for rollout in rollouts[:1]:  # a replica may have none
        metrics.add_max("policy_version", rollout.policy_version)
    metrics.add_mean("reward/mean", float(rewards.sum()), count)
    metrics.add_mean("reward/square", float(rewards.square().sum()), count)
    for rollout, reward in zip(rollouts, rewards.tolist(), strict=True):
        if rollout.prompt.source:
            metrics.add_mean(f"reward/{rollout.prompt.source}/mean", reward, 1)
    if batch.greedy_rewards is not None:
        metrics.add_mean("reward/greedy_mean", float(batch.greedy_rewards.sum()), count)
    metrics.add_mean("response/length_mean", sum(len(r.response_ids) for r in rollouts), count)
    metrics.add_mean("response/truncated_fraction", sum(r.is_truncated for r in rollouts), count)
    metrics.add_mean("entropy/mean", float(masked_sum(batch.entropy.double(), mask)), tokens)
    metrics.add_mean("tokens", tokens + sum(len(r.prompt.token_ids) for r in rollouts), 1)
    metrics.merge(s.reward.metrics())
    return metrics
