"""Inputs, float64 reference and simulated TP ranks for the tests of vocabulary-parallel log-probs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpp.parallel.vocab_logprobs import vocab_parallel_logprobs

TOKENS, VOCAB, PADDED = 13, 19, 30
BOTH = ["logprobs", "entropy", "both"]


def make_inputs(scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [T, padded], targets [T], upstream [2, T]); the padding columns are the largest logits of all.

    The upstream gradients are those of log-prob and entropy.
    """
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(TOKENS, PADDED, generator=g) * scale
    logits[:, VOCAB:] = 50.0
    targets = torch.randint(VOCAB, (TOKENS,), generator=g)
    targets[:2] = torch.tensor([0, VOCAB - 1])
    return logits, targets, torch.randn(2, TOKENS, generator=g)


def differentiate(outputs: tuple[Tensor, Tensor], x: Tensor, upstream: Tensor, of: str, retain: bool = False) -> Tensor:
    """Gradient [N, V] of the log-probs, of the entropy or of both, each by its upstream gradient."""
    chosen = {"logprobs": slice(0, 1), "entropy": slice(1, 2), "both": slice(0, 2)}[of]
    (gradient,) = torch.autograd.grad(outputs[chosen], x, tuple(upstream)[chosen], retain_graph=retain)
    return gradient


def reference(
    logits: Tensor, targets: Tensor, upstream: Tensor, temperature: float = 1.0, of: str = "both"
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs [T], entropy [T], gradient [T, padded] on every column) in float64."""
    x = logits.double().requires_grad_()
    distribution = (x[:, :VOCAB] / temperature).log_softmax(1)
    logprobs = distribution.gather(1, targets[:, None])[:, 0]
    entropy = -(distribution.exp() * distribution).sum(1)
    gradient = differentiate((logprobs, entropy), x, upstream.double(), of)
    return logprobs.detach(), entropy.detach(), gradient


def run(
    logits: Tensor, targets: Tensor, upstream: Tensor, of: str = "both", *, vocab_size: int = VOCAB, **settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs [T], entropy [T], gradient [N, padded]) of the tested function on a copy of the logits."""
    x = logits.clone().requires_grad_()
    outputs = vocab_parallel_logprobs(x, targets, vocab_size=vocab_size, **settings)
    gradient = differentiate(outputs, x, upstream, of)
    return outputs[0].detach(), outputs[1].detach(), gradient


def assert_all_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for name, a, b in zip(("logprobs", "entropy", "gradient"), found, expected, strict=True):
        assert (a.double() - b).abs().max().item() < tolerance, name


class SimulatedTP:
    """TP ranks as threads; its `all_reduce` takes the place of torch.distributed's."""

    def __init__(self, size: int, patience_s: float = 10) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=patience_s)
        self.inbox: list[Tensor] = [torch.empty(0)] * size

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        self.inbox[group.rank()] = x.clone()
        self.barrier.wait()
        stacked = torch.stack(self.inbox)
        x.copy_(stacked.amax(0) if op == dist.ReduceOp.MAX else stacked.sum(0))
        self.barrier.wait()

    def run(self, logits: Tensor, *rest: Any, **settings: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
        class Group:
            def __init__(self, rank: int) -> None:
                self.rank = lambda: rank

        slices = logits.chunk(self.size, dim=1)
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda r: run(slices[r], *rest, group=Group(r), **settings), range(self.size)))
