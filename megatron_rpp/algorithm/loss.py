"""The clipped policy loss, with KL loss and entropy bonus, aggregated over the whole optimizer step."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_rpp.algorithm.aggregation import token_weights
from megatron_rpp.algorithm.importance import importance_weights
from megatron_rpp.algorithm.kl import kl_estimate
from megatron_rpp.algorithm.masked import masked_sum
from megatron_rpp.algorithm.shapes import require_shape
from megatron_rpp.config.presets import algorithm_config
from megatron_rpp.config.schema import AlgorithmConfig

_MAX_LOG_RATIO = 80.0  # without a clamp; its exp is still a float32, and inf would make gradients NaN


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
    """PPO-clip (arXiv 1707.06347, equation 7) as the preset aggregates it, with its KL loss and entropy bonus.

    The losses of the parts of an optimizer step (microbatches, ranks) add up to the step's loss where each is
    given the counts of the whole step; `sequence_mean` needs both counts, `constant` loss_constant too.

    Args:
        policy_logprobs: [B, S] with gradient.
        old_logprobs, advantages, loss_mask: [B, S], taken without. Outside the mask anything may stand, even NaN.
        preset: a name of `config.presets.PRESETS`, or a whole AlgorithmConfig.
        global_token_count: response tokens of the whole optimizer step, over every rank and microbatch;
            None: those of loss_mask.
        global_sequence_count: responses with a token in the whole optimizer step; None: those of loss_mask.
        rollout_logprobs: [B, S] by the engine; for importance_correction.
        ref_logprobs: [B, S] by the reference, for a KL loss; without it that of a named preset is left out.
        entropy: [B, S] of the policy's distributions, with gradient; for entropy_coef.
        **overrides: settings of AlgorithmConfig that replace the preset's. loss_constant=0 takes S.

    Raises:
        ValueError: an unknown preset or setting, a value that it cannot have, a wrong shape, or a setting
            without the input that it needs.
    """
    settings = algorithm_config(preset, **overrides)
    require_shape(
        tuple(loss_mask.shape), policy_logprobs=policy_logprobs, old_logprobs=old_logprobs, advantages=advantages,
        rollout_logprobs=rollout_logprobs, ref_logprobs=ref_logprobs, entropy=entropy,
    )  # fmt: skip
    is_kl_asked = "kl_loss_coef" in overrides or isinstance(preset, AlgorithmConfig)
    _check_inputs(settings, is_kl_asked, rollout_logprobs, ref_logprobs, entropy)
    if global_sequence_count is None and global_token_count is not None and settings.loss_aggregation != "token_mean":
        warnings.warn(_NO_SEQUENCE_COUNT.format(settings.loss_aggregation), stacklevel=2)
    tokens = float((loss_mask != 0).sum()) if global_token_count is None else global_token_count
    per_token, sums = _clipped(policy_logprobs, old_logprobs.detach(), advantages.detach(), loss_mask, settings)
    if settings.importance_correction != "off" and rollout_logprobs is not None:
        importance, found = importance_weights(old_logprobs, rollout_logprobs, loss_mask, settings)
        per_token, sums = per_token * importance, sums | found
    terms = {"loss/policy": per_token}
    if settings.kl_loss_coef and ref_logprobs is not None:
        terms["loss/kl"] = settings.kl_loss_coef * _kl(policy_logprobs, ref_logprobs, loss_mask, settings)
    if settings.entropy_coef and entropy is not None:
        terms["loss/entropy"] = -settings.entropy_coef * entropy
    return _aggregated(terms, sums, token_weights(loss_mask, settings, tokens, global_sequence_count), tokens)


_NO_SEQUENCE_COUNT = (
    "loss_aggregation={} divides by the responses of this call; if they are a part of the optimizer step, pass its "
    "global_sequence_count"
)


def _clipped(
    policy_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, settings: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each token [B, S], and the token sums of its metrics."""
    mask = loss_mask != 0
    limit = settings.log_ratio_clamp or _MAX_LOG_RATIO
    log_ratio = (policy_logprobs - old_logprobs).masked_fill(~mask, 0.0).clamp(-limit, limit)
    ratio = log_ratio.exp()
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


def _aggregated(terms: dict[str, Tensor], sums: dict[str, Tensor], weights: Tensor, tokens: float) -> PolicyLoss:
    """The sum of all terms [B, S], each token at its weight; the terms' metrics are scaled to be token sums."""
    values = {name: (x.double().masked_fill(weights == 0, 0.0) * weights).sum() for name, x in terms.items()}
    loss = torch.stack(list(values.values())).sum()
    values["loss/total"] = loss
    return PolicyLoss(loss, {name: value.detach() * tokens for name, value in values.items()} | sums)


def _check_inputs(
    settings: AlgorithmConfig,
    is_kl_asked: bool,
    rollout_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
) -> None:
    """A term that is asked for needs its input; only a named preset's own KL loss is left out without one."""
    if settings.importance_correction != "off" and rollout_logprobs is None:
        raise ValueError(f"importance_correction={settings.importance_correction} needs rollout_logprobs")
    if is_kl_asked and settings.kl_loss_coef and ref_logprobs is None:
        raise ValueError(f"kl_loss_coef={settings.kl_loss_coef} needs ref_logprobs")
    if settings.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef={settings.entropy_coef} needs entropy")
