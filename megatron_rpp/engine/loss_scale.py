"""Every factor by which Megatron-Core would scale our loss or gradients, switched off in one place.

We want, for one optimizer step over microbatches m of replicas d,

    grad = sum over d, m of grad(L_dm),    L_dm = sum over tokens t of w_t * loss_t,

where the weights w_t (`algorithm.aggregation.token_weights`) hold the counts of the whole step, taken once before
it: 1 / N for the token mean, with N the response tokens of all d and m. Then `grad` is the gradient of the
step's loss, whatever the layout. Megatron (0.16) would multiply L_dm by these factors; each becomes 1:

- `schedules.forward_step_calc_loss`, 2-tuple from the loss function: cp_size / num_microbatches.
  A 3-tuple with `calculate_per_token_loss=True` is left alone: `as_megatron_loss` returns that.
- `DistributedDataParallel`, before the gradients are reduced: 1 / dp_size. With
  `calculate_per_token_loss=True` it is 1, and the reduction over DP (x CP) is a plain sum. For expert
  parameters it is 1 too. `DistributedDataParallelConfig.average_in_collective` would divide again; it is
  False by default, and Megatron refuses it together with `calculate_per_token_loss`.
- `finalize_model_grads(model, num_tokens)`: 1 / (num_tokens summed over DP x CP and microbatches).
  We pass None; the counts are in w_t already.
- `grad_scale_func`: the loss scaler of float16. It is None; bfloat16 and float32 need none.
- `clip_grad` in the optimizer scales by min(1, clip_grad / norm): wanted, and the same on every layout.

An expert's gradient comes from the tokens of all ranks that send it some, and its ranks sum it over those
that hold the same expert (`engine.optimizer` has it reduced apart from the rest): a plain sum again.

The CP ranks of a replica compute one and the same L_dm, from log-probs that each of them has in part:
`sum_over_context` adds the parts up, and gives every rank the gradient of L_dm by its own part, unscaled. So each
rank's parameters get the gradient through its own tokens (and, by the attention's reduce-scatter, through their
keys and values), and the plain sum over DP x CP is the whole. What heads count is equal on CP ranks: it is summed
over DP alone.

Two more factors act on losses that we do not have: `MoEAuxLossAutoScaler` and `MTPLossAutoScaler` give the
auxiliary losses the scale 1 under `calculate_per_token_loss` (each is then a sum over tokens, to be divided
by N with the rest). `model.moe_config` turns the balancing of experts off; with it on, its scale would have
to be 1 / N. The selection bias of a router is frozen: `moe_router_bias_update_rate` is 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup


def as_megatron_loss(loss: Tensor, outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The 3-tuple that Megatron's schedules do not scale; its token count is not used."""
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), outputs


def use_plain_gradient_sum(config: TransformerConfig) -> None:
    """Reduce gradients over DP, sequence-parallel and tied-embedding ranks as plain sums."""
    assert config.calculate_per_token_loss

    def finalize(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        finalize_model_grads(model, None, **kwargs)

    config.finalize_model_grads_func = finalize


def sum_over_context(part: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of the CP ranks' parts, on each of them. The gradient of a part is that of the sum."""
    if group is None or group.size() == 1:
        return part
    total: Tensor = _SumOverContext.apply(part, group)
    return total


class _SumOverContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None
