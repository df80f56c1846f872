"""The clipped policy loss, with KL loss and entropy bonus, aggregated over the whole optimizer step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_rpp.algorithm.importance import importance_weights
from megatron_rpp.algorithm.kl import kl_estimate
from megatron_rpp.algorithm.masked import masked_sum
from megatron_rpp.config.presets import algorithm_config
from megatron_rpp.config.schema import AlgorithmConfig


class PolicyLoss(NamedTuple):
    """A differentiable loss, and its metrics as sums: over all parts of an optimizer step, sum / tokens."""

    loss: Tensor  # float64 scalar with gradient
    sums: dict[str, Tensor]  # float64 scalars; divide by global_token_count


def policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    preset: str | AlgorithmConfig = "paper",
    global_token_count: float | None = None,
    global_sequence_count: float | None = None,
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    **overrides: Any,
) -> PolicyLoss:
    """PPO-clip (arXiv 1707.06347, equation 7) as the preset aggregates it; the losses of parts of a step add up.

    Args:
        policy_logprobs: [B, S] with gradient.
        old_logprobs, advantages, loss_mask: [B, S] without. Outside the mask anything may stand, even NaN.
        preset: a name of `config.presets.PRESETS`, or a whole AlgorithmConfig.
        global_token_count: response tokens of the whole optimizer step, over every rank and microbatch;
            None: those of loss_mask.
        global_sequence_count: responses with a token in the whole optimizer step; None: those of loss_mask.
        rollout_logprobs: [B, S] by the engine; for importance_correction.
        ref_logprobs: [B, S] by the reference; without it the preset's KL loss is left out.
        entropy: [B, S] of the policy's distributions, with gradient; for entropy_coef.
        **overrides: settings of AlgorithmConfig that replace the preset's. loss_constant=0 takes S; give it
            where the batch is in parts.

    Raises:
        ValueError: an unknown preset or setting, or a setting without the input that it needs.
    """
    settings = algorithm_config(preset, **overrides)
    _check_inputs(settings, overrides, rollout_logprobs, ref_logprobs, entropy)
    tokens = masked_sum(loss_mask.double(), loss_mask) if global_token_count is None else global_token_count
    weights = token_weights(loss_mask, settings, tokens, global_sequence_count)
    per_token, sums = _clipped(policy_logprobs, old_logprobs, advantages, loss_mask, settings)
    if settings.importance_correction != "off" and rollout_logprobs is not None:
        importance, found = importance_weights(old_logprobs, rollout_logprobs, loss_mask, settings)
        per_token, sums = per_token * importance, sums | found
    terms = {"loss/policy": _weighted(per_token, weights)}
    if settings.kl_loss_coef and ref_logprobs is not None:
        terms["loss/kl"] = settings.kl_loss_coef * _weighted(
            _kl(policy_logprobs, ref_logprobs, loss_mask, settings), weights
        )
    if settings.entropy_coef and entropy is not None:
        terms["loss/entropy"] = -settings.entropy_coef * _weighted(entropy, weights)
    loss = torch.stack(list(terms.values())).sum()
    in_tokens = {name: term.detach().double() * tokens for name, term in terms.items()}
    return PolicyLoss(loss, in_tokens | {"loss/total": loss.detach().double() * tokens} | sums)


def token_weights(
    loss_mask: Tensor, settings: AlgorithmConfig, token_count: float | Tensor, sequence_count: float | None
) -> Tensor:
    """What each token's loss counts in the loss of the optimizer step, [B, S] float64, 0 outside the mask.

    token_mean: 1 / token_count. sequence_mean: 1 / (tokens of its response x sequence_count). constant
    (Dr. GRPO, arXiv 2503.20783): 1 / (loss_constant x sequence_count).
    """
    mask = loss_mask.double()
    if settings.loss_aggregation == "token_mean":
        return mask / torch.as_tensor(token_count, dtype=torch.float64).clamp(min=1.0)
    lengths = mask.sum(dim=1, keepdim=True)
    sequences = (lengths > 0).sum().double() if sequence_count is None else sequence_count
    if settings.loss_aggregation == "constant":
        lengths = torch.full_like(lengths, settings.loss_constant or loss_mask.shape[1])
    return mask / (lengths.clamp(min=1.0) * torch.as_tensor(sequences, dtype=torch.float64).clamp(min=1.0))


def _clipped(
    policy_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, settings: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each token [B, S], and the token sums of its metrics."""
    mask = loss_mask != 0
    log_ratio = (policy_logprobs - old_logprobs).masked_fill(~mask, 0.0)
    if settings.log_ratio_clamp:
        log_ratio = log_ratio.clamp(-settings.log_ratio_clamp, settings.log_ratio_clamp)
    ratio, advantages = log_ratio.exp(), advantages.masked_fill(~mask, 0.0)
    free = -ratio * advantages
    clipped = -ratio.clamp(1 - settings.clip_eps_low, 1 + settings.clip_eps_high) * advantages
    loss = torch.maximum(free, clipped)
    sums = {"ratio/mean": ratio, "clip/fraction": clipped > free}
    if settings.dual_clip:
        bound = -settings.dual_clip * advantages
        sums["clip/dual_fraction"] = (advantages < 0) & (loss > bound)
        loss = torch.where(advantages < 0, torch.minimum(loss, bound), loss)
    return loss, {name: masked_sum(x.detach().double(), loss_mask) for name, x in sums.items()}


def _kl(policy_logprobs: Tensor, ref_logprobs: Tensor, loss_mask: Tensor, settings: AlgorithmConfig) -> Tensor:
    """KL estimate of each token [B, S]. Masked first: a gradient of 0 times that of exp(inf) would be NaN."""
    policy, ref = (x.masked_fill(loss_mask == 0, 0.0) for x in (policy_logprobs, ref_logprobs))
    return kl_estimate(policy, ref, settings.kl_loss_estimator, settings.kl_clamp, settings.kl_output_clamp)


def _weighted(per_token: Tensor, weights: Tensor) -> Tensor:
    return (per_token.double().masked_fill(weights == 0, 0.0) * weights).sum()


def _check_inputs(
    settings: AlgorithmConfig,
    overrides: dict[str, Any],
    rollout_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
) -> None:
    """A term that is asked for by name needs its input; a preset's own KL loss is left out without one."""
    if settings.importance_correction != "off" and rollout_logprobs is None:
        raise ValueError(f"importance_correction={settings.importance_correction} needs rollout_logprobs")
    if overrides.get("kl_loss_coef") and ref_logprobs is None:
        raise ValueError(f"kl_loss_coef={settings.kl_loss_coef} needs ref_logprobs")
    if settings.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef={settings.entropy_coef} needs entropy")
