"""Log-probs and entropy from vocabulary-parallel logits, a chunk of tokens at a time.

Only one chunk's float32 logits exist at once, forward and backward: the forward keeps the logits as
they came plus three numbers a token, and the backward recomputes the softmax chunk by chunk.
`fused_logprobs` needs no chunks, where a compiler is at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rpp.parallel.fused_logprobs import FusedLogprobs


def vocab_parallel_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int = 64,
    group: ProcessGroup | None = None,
    overwrite_logits: bool = False,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target token and entropy of each distribution, in nats.

    Where only one of the two is differentiated, the other costs the backward nothing.

    Args:
        logits: [N, V_padded / tp_size], this rank's slice of the vocabulary, any float type, finite.
        targets: [T] int64 token ids below `vocab_size`.
        vocab_size: true vocabulary size; padded columns get probability zero.
        rows: [T] int64, distinct, the rows of `logits` that predict `targets`; None for all, T = N.
        temperature: the distribution is softmax(logits / temperature).
        softcap: logits become softcap * tanh(logits / softcap) first. A model's own cap belongs here: applied
            to the whole logits, it would have to keep a second copy of them for its backward.
        chunk_tokens: tokens whose float32 logits exist at once; a pass takes up to 8 V / tp_size bytes for each
            (12 with a softcap).
        group: tensor-parallel group; None for an unsplit vocabulary. Its ranks pass the same `targets`,
            `rows` and `chunk_tokens`, and feed back the same gradients.
        overwrite_logits: the backward writes the gradient over the memory of `logits`, which saves a
            second [N, V_padded / tp_size]. For logits that nobody reads after the backward: another
            operation that saved them, or a second backward, raises RuntimeError; a read outside of
            autograd finds the gradient. Under torch.no_grad it changes nothing.
        fused: one compiled pass forward and one backward (`fused_logprobs`), without float32 logits in memory;
            `chunk_tokens` then has no meaning.

    Returns:
        logprobs [T] float32 and entropy [T] float32, both with gradient, once differentiable.
    """
    assert len(targets) == len(logits if rows is None else rows), "one target for each row that predicts one"
    model, own = (logits, targets, rows, vocab_size, temperature, softcap), (group, overwrite_logits)
    result: tuple[Tensor, Tensor] = (
        FusedLogprobs.apply(*model, *own) if fused else _VocabParallelLogprobs.apply(*model, chunk_tokens, *own)
    )
    return result


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        rows: Tensor | None,
        vocab_size: int,
        temperature: float,
        softcap: float | None,
        chunk_tokens: int,
        group: ProcessGroup | None,
        overwrite_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        first = logits.shape[1] * (group.rank() if group is not None else 0)
        valid = max(0, min(logits.shape[1], vocab_size - first))  # columns that are not padding
        local_targets = targets - first
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        entropy = torch.empty_like(logprobs)
        statistics = logprobs.new_empty(3, len(targets))
        for tokens, at in _chunks(len(targets), rows, chunk_tokens):
            z = _tempered(logits[at, :valid], temperature, softcap)
            logprobs[tokens], entropy[tokens], statistics[:, tokens] = _chunk_forward(z, local_targets[tokens], group)
        ctx.save_for_backward(logits, rows, local_targets, statistics)
        ctx.valid, ctx.temperature, ctx.softcap, ctx.chunk_tokens = valid, temperature, softcap, chunk_tokens
        ctx.overwrite_logits = overwrite_logits
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 9
        logits, rows, local_targets, statistics = ctx.saved_tensors
        # Unlike `.data`, `detach` shares the version counter: what else saved the logits sees them overwritten.
        gradient = logits.detach() if ctx.overwrite_logits else torch.empty_like(logits)
        _zero_elsewhere(gradient, rows, ctx.valid)
        for tokens, at in _chunks(len(local_targets), rows, ctx.chunk_tokens) if ctx.valid else ():
            z = _tempered(logits[at, : ctx.valid], ctx.temperature, ctx.softcap)
            slope_of_cap = None if ctx.softcap is None else _slope_of_cap(z, ctx.temperature / ctx.softcap)
            slope = _chunk_backward(
                z,
                local_targets[tokens],
                statistics[:, tokens],
                None if grad_logprobs is None else grad_logprobs[tokens] / ctx.temperature,
                None if grad_entropy is None else grad_entropy[tokens] / ctx.temperature,
            )
            gradient[at, : ctx.valid] = (slope if slope_of_cap is None else slope.mul_(slope_of_cap)).to(logits.dtype)
        return gradient, None, None, None, None, None, None, None, None


def _chunk_forward(z: Tensor, local_targets: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs [T], entropy [T], what the backward needs [3, T]) of one chunk of z [T, V_local], which it spoils.

    The backward needs the largest logit m, the sum of exp(z - m), and the mean of z - m over the distribution.
    """
    rows, columns = z.shape
    peak = z.amax(dim=1) if columns else torch.full((rows,), -torch.inf, device=z.device)
    if group is not None:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    z.sub_(peak[:, None])
    here, column = _local_targets(local_targets, columns)
    at_target = z.gather(1, column[:, None]).squeeze(1) * here if columns else torch.zeros_like(peak)
    weight = z.exp()
    sums = torch.stack([weight.sum(dim=1), weight.mul_(z).sum(dim=1), at_target])  # one all-reduce for three sums
    if group is not None:
        dist.all_reduce(sums, group=group)
    total, weighted, at_target = sums
    mean = weighted / total
    return at_target - total.log(), total.log() - mean, torch.stack([peak, total, mean])


def _chunk_backward(
    z: Tensor,
    local_targets: Tensor,
    statistics: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient [T, V_local] float32 with respect to z [T, V_local], in the memory of z.

    d logprob / dz_j = [j is the target] - p_j and d entropy / dz_j = -p_j (z_j - mean of z).
    """
    peak, total, mean = statistics
    z.sub_(peak[:, None])
    if grad_entropy is None:
        assert grad_logprobs is not None
        slope = z.exp_().mul_((-grad_logprobs / total)[:, None])
    else:
        weight = z.exp()
        slope = z.sub_(mean[:, None]).mul_((-grad_entropy / total)[:, None])
        if grad_logprobs is not None:
            slope.sub_((grad_logprobs / total)[:, None])
        slope.mul_(weight)
    if grad_logprobs is not None:
        here, column = _local_targets(local_targets, z.shape[1])
        slope.scatter_add_(1, column[:, None], (grad_logprobs * here)[:, None])
    return slope


def _local_targets(local_targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Which targets fall in this rank's columns [T] bool, and their column there (0 elsewhere) [T]."""
    here = (local_targets >= 0) & (local_targets < columns)
    return here, local_targets.masked_fill(~here, 0)


def _tempered(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Capped logits / temperature in float32 memory of its own, also where `logits` are float32 already."""
    z = logits.to(torch.float32, copy=True)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z if temperature == 1.0 else z.div_(temperature)


def _slope_of_cap(z: Tensor, scale: float) -> Tensor:
    """Slope of softcap * tanh(logit / softcap), from z = that / temperature and scale = temperature / softcap."""
    return (z * scale).square_().neg_().add_(1)


def _zero_elsewhere(gradient: Tensor, rows: Tensor | None, valid: int) -> None:
    """Zero what no chunk writes: the padding columns of `gradient` [N, V_local], and its rows not in `rows`."""
    gradient[:, valid:] = 0
    if rows is not None:
        unused = torch.ones(len(gradient), dtype=torch.bool, device=gradient.device).index_fill_(0, rows, False)
        gradient[unused] = 0


def _chunks(count: int, rows: Tensor | None, size: int) -> Iterator[tuple[slice, slice | Tensor]]:
    """(which targets, which rows of the logits) of each chunk."""
    for start in range(0, count, size):
        tokens = slice(start, min(start + size, count))
        yield tokens, tokens if rows is None else rows[tokens]
