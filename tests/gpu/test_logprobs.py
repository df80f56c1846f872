"""Compiled log-probs are the chunked ones, values and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_rpp.parallel.vocab_logprobs import vocab_parallel_logprobs
from tests.gpu.site import Site


def both_outputs(logits: Tensor, targets: Tensor, *, fused: bool, **options: Any) -> tuple[Tensor, ...]:
    """(log-probs, entropies, gradient of a fixed mixture of both)."""
    logits = logits.clone().requires_grad_()
    vocab = logits.shape[1] - 5  # the last columns are padding
    found = vocab_parallel_logprobs(logits, targets, vocab_size=vocab, fused=fused, overwrite_logits=True, **options)
    weights = torch.linspace(-1, 1, len(targets), device=logits.device)
    (gradient,) = torch.autograd.grad((found[0] * weights + 0.3 * found[1] * weights.flip(0)).sum(), logits)
    return found[0].detach(), found[1].detach(), gradient.clone()


def fused_is_chunked(site: Site) -> None:
    tokens, vocab = (16, 37) if site.is_tiny else (4096, 32_000)
    torch.manual_seed(0)
    logits = torch.randn(tokens, vocab).mul_(3).bfloat16().to(site.parallel.device)
    targets = torch.randint(vocab - 5, (tokens,), device=logits.device)
    for options in ({}, {"temperature": 0.7}, {"softcap": 30.0}):
        ours, theirs = (both_outputs(logits, targets, fused=fused, **options) for fused in (True, False))
        for name, a, b in zip(("log-probs", "entropies", "gradients"), ours, theirs, strict=True):
            # Sums of float32 in another order; gradients are bfloat16, one unit of which is 2^-8.
            bound = 2**-8 * b.abs().max().item() if name == "gradients" else 1e-4
            assert (a.float() - b.float()).abs().max().item() <= bound, (name, options)


def test_fused_log_probs_are_the_chunked_ones(site: Site) -> None:
    fused_is_chunked(site)
