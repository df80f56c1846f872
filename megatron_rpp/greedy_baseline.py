"""The baseline of ReMax (arXiv 2310.10505): what the greedy response to each prompt earns."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rpp.experience.types import Rollout
from megatron_rpp.parallel.collectives import from_replica_leader
from megatron_rpp.session import Session


def greedy_rewards(s: Session, rollouts: Sequence[Rollout]) -> list[float] | None:
    """One value for each of this replica's rollouts, its prompt's; None, and nothing sampled, for other estimators.

    A collective over the whole job.
    """
    if s.config.algorithm.estimator != "remax":
        return None
    prompts = {rollout.group_id: rollout.prompt for rollout in rollouts}
    with s.phase("baseline"):
        greedy = s.rollout_engine.generate([*prompts.values()], s.greedy(), group_ids=[*prompts])
        rewards = from_replica_leader(s.parallel, lambda: s.reward(greedy))
    earned = dict(zip(prompts, rewards, strict=True))
    return [earned[rollout.group_id] for rollout in rollouts]
