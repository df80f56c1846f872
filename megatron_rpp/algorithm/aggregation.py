"""What one token's loss counts in the loss of an optimizer step."""

from __future__ import annotations

from torch import Tensor

from megatron_rpp.config.schema import AlgorithmConfig


def token_weights(
    loss_mask: Tensor, settings: AlgorithmConfig, token_count: float, sequence_count: float | None
) -> Tensor:
    """Weights [B, S] float64, 0 outside the mask: the sum of weight x loss over all parts of a step is its loss.

    token_mean: 1 / token_count. sequence_mean: 1 / (tokens of its response x sequence_count). constant
    (Dr. GRPO, arXiv 2503.20783): 1 / (loss_constant x sequence_count).
    """
    mask = loss_mask.double()
    if settings.loss_aggregation == "token_mean":
        return mask / max(token_count, 1.0)
    lengths = mask.sum(dim=1, keepdim=True)
    sequences = float((lengths > 0).sum()) if sequence_count is None else sequence_count
    if settings.loss_aggregation == "constant":
        return mask / (max(sequences, 1.0) * (settings.loss_constant or loss_mask.shape[1]))
    return mask / (max(sequences, 1.0) * lengths.clamp(min=1.0))
