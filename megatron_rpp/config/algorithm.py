"""The section `algorithm`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AlgorithmConfig:
    """Advantages and policy loss. The defaults are the preset `paper`; see docs/algorithm.md for all of them."""

    preset: str = "paper"
    """Named settings for every key below but num_samples_per_prompt; keys set beside it win, earlier files do not."""
    num_samples_per_prompt: int = 4
    """Responses sampled for each prompt."""

    estimator: str = "reinforce_pp"
    """reinforce_pp, reinforce_pp_baseline (both normalized globally), grpo, dr_grpo, rloo or remax."""
    kl_placement: str = "to_go"
    """Where the KL enters the reward: to_go (return), folded (response's score), instant (own token), none."""
    kl_coef: float = 0.001
    """beta: weight of the KL penalty in the reward (the paper: 0.001 math, 0.01 general)."""
    kl_estimator: str = "k1"
    """Per-token KL estimator in the reward: k1, k2 or k3."""
    kl_clamp: float = 10.0
    """The log-ratio is clamped to +- this before a KL estimate, in reward and loss; 0: not."""
    kl_output_clamp: float = 0.0
    """A KL estimate is clamped to +- this, in reward and loss; 0: not."""
    kl_target: float = 0.0
    """Adaptive controller (arXiv 1909.08593): kl_coef moves until the metric kl/mean is this; 0: fixed."""
    kl_horizon: int = 10_000
    """Responses over which the adaptive controller corrects an error."""
    gamma: float = 1.0
    """Discount of the return from one response token to the next (reinforce_pp)."""
    gamma_skips_masked: bool = True
    """Tokens outside loss_mask, inside a response, do not discount."""
    reward_clip: float = 0.0
    """A response's score is clamped to +- this, after the baseline; 0: not."""
    lone_sample: str = "zero"
    """Score of a response that is alone in its group, where there is a group baseline: zero or raw."""
    variance_ddof: int = 0
    """Global normalization divides squares by tokens minus this: 0 (population) or 1 (Bessel)."""
    variance_floor: str = "clamp"
    """Under the root of the global normalization: clamp, max(variance, 1e-8), or add, variance + 1e-8."""

    clip_eps_low: float = 0.2
    """PPO clip: the ratio is cut below 1 - clip_eps_low."""
    clip_eps_high: float = 0.2
    """PPO clip: the ratio is cut above 1 + clip_eps_high."""
    dual_clip: float = 0.0
    """The loss of a token with negative advantage is at most this times |A| (arXiv 1912.09729); 0: unbounded."""
    log_ratio_clamp: float = 20.0
    """The log-ratio is clamped to +- this before exp; 0: not."""
    loss_aggregation: str = "token_mean"
    """token_mean, sequence_mean (of token means), or constant (token sum over responses x loss_constant)."""
    loss_constant: int = 0
    """Tokens that aggregation `constant` divides a response's sum by; 0: rollout.max_response_tokens."""
    kl_loss_coef: float = 0.0
    """Weight of a separate KL loss against the reference."""
    kl_loss_estimator: str = "k2"
    """Estimator of the KL loss: k2 or k3."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    importance_correction: str = "off"
    """Weights for sampler against trainer probabilities: off, truncated, masked or sequence_masked."""
    importance_low: float = 0.5
    """masked drops tokens, sequence_masked responses, whose weight is below this."""
    importance_high: float = 2.0
    """truncated and sequence_masked cap weights at this; masked drops tokens, sequence_masked responses, above it."""

    @property
    def uses_reference(self) -> bool:
        """Whether a KL is in the reward or in the loss; else no reference model is built."""
        return bool(self.kl_coef or self.kl_loss_coef)
