"""Held-out sets: accuracy at the sampling temperature and greedy, pass@k and maj@k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from megatron_rpp.config.schema import EvalConfig
from megatron_rpp.config.sources import held_out_sources, is_verified
from megatron_rpp.experience.types import Rollout
from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.parallel.collectives import from_replica_leader, gather_objects
from megatron_rpp.reward.verdicts import accuracy, sampled_accuracy
from megatron_rpp.session import Session


def evaluate(s: Session) -> dict[str, float]:
    """Each set's numbers and eval/policy_version; nothing where there are no held-out prompts.

    Those of data.eval are eval/accuracy, eval/greedy_accuracy, eval/pass@K and eval/maj@K, those of data.evals.NAME
    begin with eval/NAME/. Where the reward is no verdict there are only eval/reward and eval/greedy_reward. The same
    prompts and seed are used each time, so that two evaluations differ by the policy alone.
    """
    if not s.eval_prompts:
        return {}
    sampled = replace(s.sampling(0), num_samples_per_prompt=s.config.eval.samples, seed=s.config.run.seed)
    metrics = Metrics()
    with s.phase("eval"):
        for kind, sampling in (("", sampled), ("greedy_", s.greedy())):
            rollouts = s.rollout_engine.generate(s.eval_prompts, sampling)
            scores = from_replica_leader(s.parallel, partial(s.eval_reward, rollouts))
            if s.parallel.is_replica_leader:
                metrics.merge(_judged(s, kind, rollouts, scores))
    version = float(s.rollout_engine.policy_version)
    return {**metrics.reduce(gather_objects).as_dict(), "eval/policy_version": version}


def _judged(s: Session, kind: str, rollouts: Sequence[Rollout], scores: Sequence[float]) -> Metrics:
    """This replica's share of every set's numbers. `kind` is what their names begin with, "" or "greedy_"."""
    metrics = Metrics()
    for name, source in held_out_sources(s.config).items():
        prefix, verified = f"eval/{name}/" if name else "eval/", is_verified(s.config, source)
        rows = [row for row, rollout in enumerate(rollouts) if rollout.prompt.source == name]
        own = [scores[row] for row in rows]
        metrics.merge(accuracy(prefix + kind, own, is_verified=verified))
        if verified and not kind:
            metrics.merge(sampled_accuracy(prefix, [rollouts[row] for row in rows], own, _pass_at(s.config.eval)))
    return metrics


def _pass_at(config: EvalConfig) -> tuple[int, ...]:
    return config.pass_at or ((config.samples,) if config.samples > 1 else ())
