"""Per-token KL estimators between policy and reference (J. Schulman, "Approximating KL divergence")."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_rpp.config.presets import algorithm_config
from megatron_rpp.config.schema import AlgorithmConfig


def kl_estimate(
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    estimator: str,
    clamp: float | None = None,
    output_clamp: float | None = None,
) -> Tensor:
    """Estimate of KL(policy || reference) at each sampled token, differentiable in policy_logprobs.

    As a reward, take k1: its mean is the KL. As a loss, its gradient counts: that of k2, k1 * grad log pi, is
    on average the gradient of KL(policy || reference); that of k3, (1 - exp(-k1)) * grad log pi, is that of
    KL(reference || policy); that of k1, grad log pi, is zero on average and must not be used. Where a clamp
    is reached the gradient is zero.

    Args:
        policy_logprobs, ref_logprobs: [B, S] log-probs of the sampled tokens.
        estimator: k1 = log-ratio; k2 = k1^2 / 2; k3 = exp(-k1) - 1 + k1.
        clamp: k1 is clamped to +- this first; None or 0 leaves it.
        output_clamp: the estimate is clamped to +- this; None or 0 leaves it.

    Returns:
        [B, S], of the inputs' dtype.

    Raises:
        ValueError: an unknown estimator.
    """
    k1 = policy_logprobs - ref_logprobs
    if clamp:
        k1 = k1.clamp(-clamp, clamp)
    if estimator == "k1":
        kl = k1
    elif estimator == "k2":
        kl = k1.square() / 2
    elif estimator == "k3":
        kl = (-k1).expm1() + k1  # exp(-k1) - 1 would lose every digit of a small k1
    else:
        raise ValueError(f"kl_estimator={estimator} is not one of k1, k2, k3")
    return kl.clamp(-output_clamp, output_clamp) if output_clamp else kl


def reward_kl(
    policy_logprobs: Tensor, ref_logprobs: Tensor, *, preset: str | AlgorithmConfig = "paper", **overrides: Any
) -> Tensor:
    """The KL estimate [B, S] that a preset puts into the reward, with its estimator and clamps."""
    settings: AlgorithmConfig = algorithm_config(preset, **overrides)
    return kl_estimate(
        policy_logprobs, ref_logprobs, settings.kl_estimator, settings.kl_clamp, settings.kl_output_clamp
    )
