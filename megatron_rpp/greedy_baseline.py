"""The baseline of ReMax (arXiv 2310.10505): what the greedy response to each prompt earns."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rpp.experience.types import Prompt
from megatron_rpp.parallel.collectives import from_replica_leader
from megatron_rpp.session import Session


def greedy_rewards(s: Session, prompts: Sequence[Prompt]) -> list[float] | None:
    """One value a rollout of this replica, its prompt's; None, and nothing sampled, for other estimators.

    A collective over the whole job.
    """
    if s.config.algorithm.estimator != "remax":
        return None
    with s.phase("baseline"):
        rollouts = s.rollout_engine.generate(prompts, s.greedy())
        rewards = from_replica_leader(s.parallel, lambda: s.reward(rollouts))
    return [reward for reward in rewards for _ in range(s.config.algorithm.num_samples_per_prompt)]
