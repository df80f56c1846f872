"""Vocabulary-parallel log-probs against torch's log_softmax, whole and split over (simulated) TP ranks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rpp.parallel.vocab_logprobs import vocab_parallel_logprobs

TOKENS, VOCAB, PADDED = 13, 19, 24


def make_inputs(scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [T, padded], targets, upstream gradient); the padding columns are the largest logits of all."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(TOKENS, PADDED, generator=g) * scale
    logits[:, VOCAB:] = 50.0
    targets = torch.randint(VOCAB, (TOKENS,), generator=g)
    targets[:2] = torch.tensor([0, VOCAB - 1])
    return logits, targets, torch.randn(TOKENS, generator=g)


def reference(logits: Tensor, targets: Tensor, upstream: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, gradient on every column) in float64."""
    x = logits.double().requires_grad_()
    distribution = (x[:, :VOCAB] / temperature).log_softmax(1)
    logprobs = distribution.gather(1, targets[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(logprobs, x, upstream.double())
    return logprobs.detach(), -(distribution.exp() * distribution).sum(1).detach(), gradient


def run(logits: Tensor, targets: Tensor, upstream: Tensor, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = logits.clone().requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(x, targets, vocab_size=VOCAB, **settings)
    assert not entropy.requires_grad
    (gradient,) = torch.autograd.grad(logprobs, x, upstream)
    return logprobs.detach(), entropy, gradient


def assert_all_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for name, a, b in zip(("logprobs", "entropy", "gradient"), found, expected, strict=True):
        assert (a.double() - b).abs().max().item() < tolerance, name


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("chunk", [1, 5, 13, 1000])
def test_equals_log_softmax_with_gradient_at_any_temperature_and_chunk_size(temperature: float, chunk: int) -> None:
    inputs = make_inputs()
    found = run(*inputs, temperature=temperature, chunk_tokens=chunk)
    assert_all_close(found, reference(*inputs, temperature), 4e-6)


def test_padding_columns_get_zero_probability_and_zero_gradient() -> None:
    """Their logits are huge here: counted, they would take all the probability."""
    logits, targets, upstream = make_inputs()
    logprobs, _, gradient = run(logits, targets, upstream)
    assert (gradient[:, VOCAB:] == 0).all()
    other, _, _ = run(torch.where(torch.arange(PADDED) < VOCAB, logits, torch.nan), targets, upstream)
    assert torch.equal(logprobs, other)


def test_huge_logits_neither_overflow_nor_give_nan() -> None:
    logits, targets, upstream = make_inputs(scale=1e4)
    found = run(logits + 1e5, targets, upstream)
    expected = reference(logits + 1e5, targets, upstream, 1.0)
    assert torch.isfinite(found[0]).all() and torch.isfinite(found[1]).all()
    assert ((found[0] - expected[0]).abs() <= 1e-6 * expected[0].abs() + 1e-6).all()
    assert (found[2] - expected[2]).abs().max() < 1e-2  # float32 logits near 1e5 are 8e-3 apart


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, targets, upstream = make_inputs()
    logits = logits.bfloat16()
    logprobs, entropy, gradient = run(logits, targets, upstream)
    expected = reference(logits, targets, upstream, 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    for found, exact in zip((logprobs, entropy), expected[:2], strict=True):
        assert (found - exact).abs().max() < 4e-6
    torch.testing.assert_close(gradient.double(), expected[2], rtol=2**-8, atol=1e-7)


def test_no_tokens_give_an_empty_result_and_a_zero_gradient() -> None:
    """A microbatch without response tokens."""
    logits = torch.randn(0, PADDED, requires_grad=True)
    logprobs, entropy = vocab_parallel_logprobs(logits, torch.zeros(0, dtype=torch.int64), vocab_size=VOCAB)
    logprobs.sum().backward()
    assert logprobs.numel() == entropy.numel() == 0 and logits.grad is not None


class SimulatedTP:
    """TP ranks as threads; its `all_reduce` takes the place of torch.distributed's."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=10)
        self.inbox: list[Tensor] = [torch.empty(0)] * size

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        self.inbox[group.rank()] = x.clone()
        self.barrier.wait()
        stacked = torch.stack(self.inbox)
        x.copy_(stacked.amax(0) if op == dist.ReduceOp.MAX else stacked.sum(0))
        self.barrier.wait()

    def run(self, logits: Tensor, *rest: Tensor, **settings: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
        class Group:
            def __init__(self, rank: int) -> None:
                self.rank = lambda: rank

        slices = logits.chunk(self.size, dim=1)
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda r: run(slices[r], *rest, group=Group(r), **settings), range(self.size)))


@pytest.mark.parametrize("tp_size", [2, 4, 8])  # of 8 ranks with 3 columns each, the last has padding only
def test_tensor_parallel_ranks_agree_with_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch, tp_size: int) -> None:
    tp, inputs = SimulatedTP(tp_size), make_inputs()
    monkeypatch.setattr(dist, "all_reduce", tp.all_reduce)
    ranks = tp.run(*inputs, temperature=0.7, chunk_tokens=4)
    for logprobs, entropy, _ in ranks:
        assert torch.equal(logprobs, ranks[0][0]) and torch.equal(entropy, ranks[0][1])
    joined = (ranks[0][0], ranks[0][1], torch.cat([gradient for _, _, gradient in ranks], dim=1))
    assert_all_close(joined, reference(*inputs, 0.7), 4e-6)
