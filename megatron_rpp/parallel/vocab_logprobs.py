"""Log-probs and entropy from vocabulary-parallel logits, a chunk of tokens at a time.

Only one chunk's float32 logits exist at once, forward and backward: the forward keeps the logits as
they came plus one log-sum-exp a token, and the backward recomputes the softmax chunk by chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def vocab_parallel_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target token and entropy of each distribution.

    Args:
        logits: [T, V_padded / tp_size], this rank's slice of the vocabulary, any float type.
        targets: [T] int64 token ids below `vocab_size`.
        vocab_size: true vocabulary size; padded columns get probability zero.
        temperature: the distribution is softmax(logits / temperature).
        chunk_tokens: tokens whose float32 logits exist at once.
        group: tensor-parallel group; None for an unsplit vocabulary.

    Returns:
        logprobs [T] float32 with gradient, entropy [T] float32 without.
    """
    result: tuple[Tensor, Tensor] = _VocabParallelLogprobs.apply(
        logits, targets, vocab_size, temperature, chunk_tokens, group
    )
    return result


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        vocab_size: int,
        temperature: float,
        chunk_tokens: int,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        first = logits.shape[1] * (group.rank() if group is not None else 0)
        valid = max(0, min(logits.shape[1], vocab_size - first))  # columns that are not padding
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        entropy, logsumexp = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for rows in _chunks(len(targets), chunk_tokens):
            z = logits[rows, :valid].float() / temperature
            logprobs[rows], entropy[rows], logsumexp[rows] = _chunk_forward(z, targets[rows] - first, group)
        ctx.save_for_backward(logits, targets - first, logsumexp)
        ctx.valid, ctx.temperature, ctx.chunk_tokens = valid, temperature, chunk_tokens
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, local_targets, logsumexp = ctx.saved_tensors
        grad_logits = torch.zeros_like(logits)
        rows_of_chunks = _chunks(len(local_targets), ctx.chunk_tokens) if ctx.valid else []
        for rows in rows_of_chunks:
            z = logits[rows, : ctx.valid].float() / ctx.temperature
            minus_p = (z - logsumexp[rows, None]).exp_().neg_()
            here, column = _local_targets(local_targets[rows], ctx.valid)
            minus_p.scatter_add_(1, column[:, None], here[:, None].float())
            grad_logits[rows, : ctx.valid] = minus_p.mul_(grad[rows, None] / ctx.temperature).to(logits.dtype)
        return grad_logits, None, None, None, None, None


def _chunk_forward(z: Tensor, local_targets: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, logsumexp), each [T], of one chunk of tempered logits z [T, V_local]."""
    rows, columns = z.shape
    peak = z.amax(dim=1) if columns else torch.full((rows,), -torch.inf, device=z.device)
    if group is not None:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    z = z - peak[:, None]
    weight = z.exp()
    here, column = _local_targets(local_targets, columns)
    at_target = z.gather(1, column[:, None]).squeeze(1) * here if columns else torch.zeros_like(peak)
    sums = torch.stack([weight.sum(dim=1), (weight * z).sum(dim=1), at_target])  # one all-reduce for three sums
    if group is not None:
        dist.all_reduce(sums, group=group)
    total, weighted, at_target = sums
    return at_target - total.log(), total.log() - weighted / total, peak + total.log()


def _local_targets(local_targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Which targets fall in this rank's columns [T] bool, and their column there (0 elsewhere) [T]."""
    here = (local_targets >= 0) & (local_targets < columns)
    return here, local_targets.masked_fill(~here, 0)


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
