"""Every factor by which Megatron-Core would scale our loss or gradients, switched off in one place.

We want, for one optimizer step over microbatches m of replicas d,

    grad = sum over d, m of grad(L_dm),    L_dm = (sum of token losses in dm) / N,

with N the global token count, computed once before the step. Then `grad` is the gradient of the token
mean over the whole step, whatever the layout. Megatron's factors and what becomes of them:

- `schedules.forward_step_calc_loss` multiplies a 2-tuple loss by cp_size / num_microbatches. A 3-tuple with
  `calculate_per_token_loss=True` is left alone: `as_megatron_loss` returns that.
- `DistributedDataParallel` pre-scales gradients by 1 / dp_size. With `calculate_per_token_loss=True` its
  factor is 1, and the reduction over DP is a plain sum.
- `finalize_model_grads(model, num_tokens)` divides by the summed num_tokens of the 3-tuples. We pass None:
  N is already in the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def as_megatron_loss(loss: Tensor, outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The 3-tuple that Megatron's schedules do not scale; its token count is not used."""
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), outputs


def use_plain_gradient_sum(config: TransformerConfig) -> None:
    """Reduce gradients over DP, sequence-parallel and tied-embedding ranks as plain sums."""
    assert config.calculate_per_token_loss

    def finalize(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        finalize_model_grads(model, None, **kwargs)

    config.finalize_model_grads_func = finalize
