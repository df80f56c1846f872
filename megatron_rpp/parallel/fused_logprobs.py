"""Log-probs and entropy from vocabulary-parallel logits, one compiled pass forward and one backward.

Both read the logits in their own type and compute in float32 registers: the forward keeps a few numbers a token,
the backward writes the gradient over the logits that it reads. `vocab_logprobs` computes the same in chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rpp import device
from megatron_rpp.device.compiler import any_size, forget_kernels, kernel, why_no_kernels
from megatron_rpp.device.memory import wait_for_device


class FusedLogprobs(torch.autograd.Function):
    """See `vocab_logprobs.vocab_parallel_logprobs`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        rows: Tensor | None,
        vocab_size: int,
        temperature: float,
        softcap: float | None,
        group: ProcessGroup | None,
        overwrite_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        first = logits.shape[1] * (group.rank() if group is not None else 0)
        ctx.valid = max(0, min(logits.shape[1], vocab_size - first))  # columns that are not padding
        ctx.temperature, ctx.softcap, ctx.overwrite_logits = temperature, softcap, overwrite_logits
        rows = torch.arange(len(targets), device=logits.device) if rows is None else rows
        found = logits.new_zeros((4, len(targets)), dtype=torch.float32)
        if ctx.valid and len(targets):
            selection = any_size(rows), any_size(targets - first)
            found = _statistics(any_size(logits), *selection, ctx.valid, temperature, softcap)
        elif not ctx.valid:
            found[0] = -torch.inf
        peak, total, weighted, at_target = _over_ranks(found, group)
        mean = weighted / total
        ctx.save_for_backward(logits, rows, targets - first, torch.stack([peak, total, mean]))
        ctx.set_materialize_grads(False)
        return at_target - peak - total.log(), total.log() - mean

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 8
        logits, rows, local_targets, statistics = ctx.saved_tensors
        # Unlike `.data`, `detach` shares the version counter: what else saved the logits sees them overwritten.
        gradient = logits.detach() if ctx.overwrite_logits else logits.clone()
        if not (ctx.valid and len(rows)):
            return gradient.zero_(), *(None,) * 7
        upstream = [torch.zeros_like(statistics[0]) if x is None else x for x in (grad_logprobs, grad_entropy)]
        of_rows = statistics.new_zeros((5, len(logits)))  # 0: no row of `rows`
        of_rows[:, rows] = torch.cat([statistics, torch.stack(upstream) / ctx.temperature])
        columns = rows.new_zeros(len(logits)).index_copy_(0, rows, local_targets)
        _to_gradient(
            any_size(gradient), any_size(columns), any_size(of_rows, dim=1), ctx.valid, ctx.temperature, ctx.softcap
        )
        return gradient, *(None,) * 7


def why_not_fused() -> str | None:
    """What keeps these kernels from this host and its device, in words; None where both have compiled and run.

    Compilers that are there may still not work together: Triton, its compiler, the driver and the GPU each are of
    some version.
    """
    if missing := why_no_kernels():
        return missing
    try:
        logits = torch.zeros(4, 8, dtype=torch.bfloat16, device=device.current(), requires_grad=True)
        targets = torch.arange(3, device=logits.device)
        logprobs, entropy = FusedLogprobs.apply(logits, targets, targets, 7, 1.0, None, None, False)
        (logprobs.sum() + entropy.sum()).backward()
        wait_for_device()
    except Exception as error:  # whatever compilers and drivers raise
        cause = getattr(error, "inner_exception", error)  # torch's own first line only says where it was raised
        return f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
    finally:
        forget_kernels()  # or the sizes of these tensors would be the first of several that kernels are compiled for
    return None


def _over_ranks(found: Tensor, group: ProcessGroup | None) -> Tensor:
    """`found` [4, T] of this rank's columns, as it is of those of all ranks, with the largest peak."""
    if group is None:
        return found
    local_peak, total, weighted, at_target = found
    peak = local_peak.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    lower = (local_peak - peak).clamp(min=-1e4)  # a rank without columns has -inf, and exp(-1e4) is 0 too
    scale = lower.exp()
    sums = torch.stack([total * scale, (weighted + lower * total) * scale, at_target])
    dist.all_reduce(sums, group=group)
    return torch.cat([peak[None], sums])


@kernel
def _statistics(
    logits: Tensor, rows: Tensor, columns: Tensor, valid: int, temperature: float, softcap: float | None
) -> Tensor:
    """[4, T] float32 of z = (capped logits / temperature)[rows, :valid], for the target's `columns` [T].

    The largest z of each row m, the sum of exp(z - m), the sum of exp(z - m) (z - m), and z at the target (0 where
    that is no column of these).
    """
    z = _capped(logits[:, :valid][rows], softcap) / temperature
    peak = z.amax(dim=1)
    below = z - peak[:, None]
    weight = below.exp()
    is_target = torch.arange(valid, device=z.device) == columns[:, None]
    at_target = torch.where(is_target, z, 0.0).sum(dim=1)
    return torch.stack([peak, weight.sum(dim=1), (weight * below).sum(dim=1), at_target])


@kernel
def _to_gradient(
    logits: Tensor, columns: Tensor, of_rows: Tensor, valid: int, temperature: float, softcap: float | None
) -> None:
    """Write the gradient with respect to the logits [N, V_local] over them; see `vocab_logprobs._chunk_backward`.

    of_rows: [5, N] peak, total and mean of each row's distribution, gradients of log-prob and entropy / temperature.
    """
    peak, total, mean, grad_logprobs, grad_entropy = of_rows[:, :, None]
    capped = _capped(logits, softcap)
    below = capped / temperature - peak
    slope = -below.exp() / total * (grad_logprobs + grad_entropy * (below - mean))
    column = torch.arange(logits.shape[1], device=logits.device)
    slope = slope + torch.where(column == columns[:, None], grad_logprobs, 0.0)
    if softcap is not None:
        slope = slope * (1.0 - (capped / softcap).square())
    logits.copy_(torch.where((column < valid) & (total > 0), slope, 0.0))


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    z = logits.float()
    return z if softcap is None else softcap * torch.tanh(z / softcap)
