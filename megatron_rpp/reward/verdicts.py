"""What held-out responses are judged by, and the numbers of one held-out set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_rpp.algorithm.pass_at_k import maj_at_k, pass_at_k
from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.reward.math.vote import vote

if TYPE_CHECKING:
    from megatron_rpp.experience.types import Rollout

_RIGHT = 1.0 - 1e-6  # reasoning-gym's verifiers give part of the score for part of the answer


def verdict_only(config: RewardConfig) -> RewardConfig:
    """`config` for evaluation: 1 for right and 0 for wrong, and nothing for form, length or the rest of the batch."""
    return replace(
        config,
        correct=1.0,
        wrong=0.0,
        format="none",
        format_reward=0.0,
        overlong_buffer_tokens=0,
        normalization="none",
    )


def accuracy(prefix: str, scores: Sequence[float], *, is_verified: bool) -> Metrics:
    """Mean score under PREFIXaccuracy; PREFIXreward where scores are grades rather than verdicts."""
    metrics = Metrics()
    metrics.add_mean(prefix + ("accuracy" if is_verified else "reward"), sum(scores), len(scores))
    return metrics


def sampled_accuracy(
    prefix: str, rollouts: Sequence[Rollout], scores: Sequence[float], pass_at: Sequence[int], *, votes: bool = True
) -> Metrics:
    """PREFIXpass@K and PREFIXmaj@K for each k of `pass_at`, as means over prompts.

    Args:
        prefix: "eval/NAME/".
        rollouts: the samples to each prompt of the set, at least the largest k of them.
        scores: the verdict on each, 1 for right.
        pass_at: the k.
        votes: responses have answers that can be compared; else there is no maj@K.
    """
    metrics, groups = Metrics(), dict[int, list[int]]()
    for row, rollout in enumerate(rollouts):
        groups.setdefault(rollout.group_id, []).append(row)
    answers, right = [vote(r) if pass_at and votes else None for r in rollouts], [score >= _RIGHT for score in scores]
    for rows in groups.values():
        own_answers, own_right = [answers[row] for row in rows], [right[row] for row in rows]
        for k in pass_at:
            metrics.add_mean(f"{prefix}pass@{k}", pass_at_k(len(rows), sum(own_right), k), 1)
            if votes:
                metrics.add_mean(f"{prefix}maj@{k}", maj_at_k(own_answers, own_right, k), 1)
    return metrics
