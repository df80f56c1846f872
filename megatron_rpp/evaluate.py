"""Held-out accuracy, at the sampling temperature and greedy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.parallel.collectives import from_replica_leader, gather_objects
from megatron_rpp.session import Session


def evaluate(s: Session) -> dict[str, float]:
    """eval/accuracy, eval/greedy_accuracy and eval/policy_version; nothing where there are no held-out prompts.

    Accuracy is the mean reward, scaled so that reward.wrong is 0 and reward.correct is 1. The same
    prompts and seed are used each time, so that two evaluations differ by the policy alone.
    """
    if not s.eval_prompts:
        return {}
    sampled = replace(s.sampling(0), num_samples_per_prompt=1, seed=s.config.run.seed)
    metrics = Metrics()
    with s.phase("eval"):
        for name, sampling in (("eval/accuracy", sampled), ("eval/greedy_accuracy", s.greedy())):
            rollouts = s.rollout_engine.generate(s.eval_prompts, sampling)
            rewards = from_replica_leader(s.parallel, partial(s.eval_reward, rollouts))
            if s.parallel.is_replica_leader:
                right = sum((r - s.config.reward.wrong) for r in rewards)
                metrics.add_mean(name, right / (s.config.reward.correct - s.config.reward.wrong), len(rewards))
    version = float(s.rollout_engine.policy_version)
    return {**metrics.reduce(gather_objects).as_dict(), "eval/policy_version": version}
