"""Held-out sets: accuracy at the sampling temperature and greedy, pass@k and maj@k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from megatron_rpp.config.schema import EvalConfig
from megatron_rpp.config.sources import gives_verdicts, held_out_sources, is_verified
from megatron_rpp.experience.types import Rollout
from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.parallel.collectives import from_replica_leader, gather_objects
from megatron_rpp.reward.protocol import RewardError
from megatron_rpp.reward.verdicts import accuracy, sampled_accuracy
from megatron_rpp.session import Session


def evaluate(s: Session) -> dict[str, float]:
    """Each set's numbers and eval/policy_version; nothing where there are no held-out prompts.

    Those of data.evals.NAME are eval/NAME/accuracy, eval/NAME/greedy_accuracy, eval/NAME/pass@K and, where answers
    can be compared, eval/NAME/maj@K. Where the reward is no verdict there are only eval/NAME/reward and
    eval/NAME/greedy_reward. The same prompts and seed are used each time, so that two evaluations differ by the policy
    alone.

    Raises:
        RewardError: what the configuration calls verdicts is not between 0 and 1.
    """
    if not s.eval_prompts:
        return {}
    sampled = replace(s.sampling(0), num_samples_per_prompt=s.config.eval.samples, seed=s.config.run.seed)
    metrics = Metrics()
    with s.phase("eval"):
        for kind, sampling in (("", sampled), ("greedy_", s.greedy())):
            rollouts = s.rollout_engine.generate(s.eval_prompts, sampling)
            scores = from_replica_leader(s.parallel, partial(_scores, s, rollouts))
            if s.parallel.is_replica_leader:
                metrics.merge(_judged(s, kind, rollouts, scores))
    version = float(s.rollout_engine.policy_version)
    return {**metrics.reduce(gather_objects).as_dict(), "eval/policy_version": version}


def _scores(s: Session, rollouts: Sequence[Rollout]) -> list[float]:
    """What the responses of all sets earn. Raises as `evaluate`."""
    scores = s.eval_reward(rollouts)
    promised = {name for name, source in s.config.data.evals.items() if source.verdicts}
    for rollout, score in zip(rollouts, scores, strict=True):
        name = rollout.prompt.source
        if name in promised and not 0 <= score <= 1:
            raise RewardError(
                f"a response of data.evals.{name} was given the reward {score:g}, and data.evals.{name}.verdicts=true "
                "says that 1 is right and less, down to 0, is wrong; change the one or the other"
            )
    return scores


def _judged(s: Session, kind: str, rollouts: Sequence[Rollout], scores: Sequence[float]) -> Metrics:
    """This replica's share of every set's numbers. `kind` is what their names begin with, "" or "greedy_"."""
    metrics = Metrics()
    for name, source in held_out_sources(s.config).items():
        prefix, are_verdicts = f"eval/{name}/", gives_verdicts(s.config, source)
        rows = [row for row, rollout in enumerate(rollouts) if rollout.prompt.source == name]
        own = [scores[row] for row in rows]
        metrics.merge(accuracy(prefix + kind, own, is_verified=are_verdicts))
        if are_verdicts and not kind:
            responses, votes = [rollouts[row] for row in rows], is_verified(s.config, source)
            metrics.merge(sampled_accuracy(prefix, responses, own, _pass_at(s.config.eval), votes=votes))
    return metrics


def _pass_at(config: EvalConfig) -> tuple[int, ...]:
    return config.pass_at or ((config.samples,) if config.samples > 1 else ())
