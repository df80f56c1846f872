"""Correction for the sampler's probabilities differing from the trainer's, at equal weights.

The gradient is taken as if the trainer had sampled; the weight of a token is pi_trainer / pi_sampler, cut so
that it cannot explode: `truncated` is TIS, `masked` is IcePop, `sequence_masked` is seq-mask-TIS of the peers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpp.algorithm.masked import masked_sum
from megatron_rpp.config.schema import AlgorithmConfig


def importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, loss_mask: Tensor, settings: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights [B, S] without gradient, 0 outside the mask, and the token sums of their metrics.

    With w = exp(old - rollout) at each token:
    `truncated` gives min(w, importance_high); `masked` gives w where it lies from importance_low to
    importance_high, else 0; `sequence_masked` gives min(w, importance_high) in the responses whose geometric
    mean of w lies in that range, else 0.

    Args:
        old_logprobs, rollout_logprobs: [B, S] log-probs of the sampled tokens by trainer and engine.
    """
    mask = loss_mask != 0
    low, high = settings.importance_low, settings.importance_high
    with torch.no_grad():
        log_ratio = (old_logprobs - rollout_logprobs).double().masked_fill(~mask, 0.0)
        raw = log_ratio.exp()
        if settings.importance_correction == "truncated":
            kept, weights = torch.ones_like(mask), raw.clamp(max=high)
        elif settings.importance_correction == "masked":
            kept, weights = (raw >= low) & (raw <= high), raw
        else:
            geometric = (log_ratio.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).exp()[:, None]
            kept, weights = (geometric >= low) & (geometric <= high), raw.clamp(max=high)
        weights = weights.masked_fill(~(kept & mask), 0.0)
        sums = {
            "importance/weight_mean": masked_sum(weights, loss_mask),
            "importance/masked_fraction": masked_sum((~kept).double().expand_as(raw), loss_mask),
            "importance/truncated_fraction": masked_sum(((raw > high) & kept).double(), loss_mask),
        }
    return weights.to(old_logprobs.dtype), sums
