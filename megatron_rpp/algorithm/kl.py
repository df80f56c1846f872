"""Per-token KL estimators between policy and reference (J. Schulman, "Approximating KL divergence")."""

from __future__ import annotations

from torch import Tensor


def kl_estimate(policy_logprobs: Tensor, ref_logprobs: Tensor, estimator: str, clamp: float | None = None) -> Tensor:
    """Estimate of KL(policy || reference) at each sampled token.

    Args:
        policy_logprobs, ref_logprobs: [B, S] log-probs of the sampled tokens.
        estimator: k1 = log-ratio; k2 = k1^2 / 2; k3 = exp(-k1) - 1 + k1.
        clamp: k1 is clamped to +- this first; None leaves it.

    Returns:
        [B, S], of the inputs' dtype.
    """
    k1 = policy_logprobs - ref_logprobs
    if clamp is not None:
        k1 = k1.clamp(-clamp, clamp)
    if estimator == "k1":
        return k1
    if estimator == "k2":
        return k1.square() / 2
    if estimator == "k3":
        return (-k1).exp() - 1 + k1
    raise ValueError(f"kl_estimator={estimator} is not one of k1, k2, k3")
