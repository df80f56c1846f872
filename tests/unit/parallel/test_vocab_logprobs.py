"""Vocabulary-parallel log-probs and entropy against float64 autograd, whole and over (simulated) TP ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rpp.parallel import vocab_logprobs
from megatron_rpp.parallel.vocab_logprobs import vocab_parallel_logprobs
from tests.support.vocab_logprobs import (
    BOTH,
    PADDED,
    TOKENS,
    VOCAB,
    SimulatedTP,
    assert_all_close,
    differentiate,
    make_inputs,
    reference,
    run,
)


@pytest.mark.parametrize("of", BOTH)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("chunk", [1, 5, 13, 1000])
def test_equals_autograd_in_float64_at_any_temperature_and_chunk_size(of: str, temperature: float, chunk: int) -> None:
    inputs = make_inputs()
    found = run(*inputs, of, temperature=temperature, chunk_tokens=chunk)
    assert_all_close(found, reference(*inputs, temperature, of), 4e-6)


def test_gradient_of_the_entropy_is_zero_on_a_uniform_and_small_on_a_certain_distribution() -> None:
    """Both ends of the entropy: log V, and 0 without 0 x log 0."""
    logits = torch.zeros(2, PADDED)
    logits[1, 4] = 1e4
    _, entropy, gradient = run(logits, torch.tensor([3, 4]), torch.ones(2, 2), "entropy")
    assert entropy.tolist() == pytest.approx([torch.tensor(float(VOCAB)).log().item(), 0.0], abs=1e-6)
    assert gradient.abs().max() < 1e-7


def test_padding_columns_get_zero_probability_and_zero_gradient() -> None:
    """Their logits are huge here: counted, they would take all the probability."""
    logits, targets, upstream = make_inputs()
    logprobs, entropy, gradient = run(logits, targets, upstream)
    assert (gradient[:, VOCAB:] == 0).all()
    others = run(torch.where(torch.arange(PADDED) < VOCAB, logits, torch.nan), targets, upstream)
    assert torch.equal(logprobs, others[0]) and torch.equal(entropy, others[1]) and torch.equal(gradient, others[2])


def test_huge_logits_neither_overflow_nor_give_nan() -> None:
    logits, targets, upstream = make_inputs(scale=1e4)
    found = run(logits + 1e5, targets, upstream)
    expected = reference(logits + 1e5, targets, upstream)
    assert torch.isfinite(found[0]).all() and torch.isfinite(found[1]).all()
    assert ((found[0] - expected[0]).abs() <= 1e-6 * expected[0].abs() + 1e-6).all()
    assert (found[2] - expected[2]).abs().max() < 1e-6


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, targets, upstream = make_inputs()
    logits = logits.bfloat16()
    logprobs, entropy, gradient = run(logits, targets, upstream, temperature=0.7)
    expected = reference(logits, targets, upstream, 0.7)
    assert logprobs.dtype == entropy.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    for found, exact in zip((logprobs, entropy), expected[:2], strict=True):
        assert (found - exact).abs().max() < 4e-6
    torch.testing.assert_close(gradient.double(), expected[2], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", BOTH)
def test_rows_equal_selecting_first_and_other_rows_get_zero_gradient(
    of: str, dtype: torch.dtype, overwrite: bool
) -> None:
    """In any order; what the other rows hold, here NaN, does not matter."""
    logits, targets, upstream = make_inputs()
    rows = torch.tensor([9, 2, 3, 12, 0, 7])
    chosen = (targets[rows], upstream[:, rows])
    settings: dict[str, Any] = {"temperature": 0.7, "chunk_tokens": 4}
    expected = run(logits[rows].to(dtype), *chosen, of, **settings)
    others = [i for i in range(TOKENS) if i not in rows.tolist()]
    logits[others] = torch.nan
    found = run(logits.to(dtype), *chosen, of, rows=rows, overwrite_logits=overwrite, **settings)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.equal(found[2][rows], expected[2])
    assert (found[2][others] == 0).all()


@pytest.mark.parametrize("rows", [None, torch.zeros(0, dtype=torch.int64)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_no_tokens_give_an_empty_result_and_a_zero_gradient(rows: Tensor | None, overwrite: bool) -> None:
    """A microbatch without response tokens."""
    logits = torch.randn(0 if rows is None else 5, PADDED, requires_grad=True)
    no_targets = torch.zeros(0, dtype=torch.int64)
    outputs = vocab_parallel_logprobs(logits, no_targets, vocab_size=VOCAB, rows=rows, overwrite_logits=overwrite)
    (outputs[0].sum() + outputs[1].sum()).backward()
    assert outputs[0].numel() == outputs[1].numel() == 0
    assert logits.grad is not None and (logits.grad == 0).all()


def test_a_target_count_that_does_not_fit_the_rows_is_refused() -> None:
    """Fewer targets than rows would leave rows out in silence."""
    logits, targets, _ = make_inputs()
    with pytest.raises(AssertionError, match="one target for each row"):
        vocab_parallel_logprobs(logits, targets[:5], vocab_size=VOCAB)


@pytest.mark.parametrize("of", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overwritten_logits_hold_the_same_gradient(of: str, dtype: torch.dtype) -> None:
    logits, targets, upstream = make_inputs()
    logits = logits.to(dtype)
    settings: dict[str, Any] = {"temperature": 0.7, "chunk_tokens": 4}
    expected = run(logits, targets, upstream, of, **settings)
    x = logits.clone().requires_grad_()
    outputs = vocab_parallel_logprobs(x, targets, vocab_size=VOCAB, overwrite_logits=True, **settings)
    assert torch.equal(x, logits), "only the backward overwrites"
    gradient = differentiate(outputs, x, upstream, of)
    assert torch.equal(gradient, expected[2])
    assert gradient.data_ptr() == x.data_ptr() and not gradient.requires_grad


def test_overwriting_reaches_through_a_view_as_the_heads_pass_it() -> None:
    """Logits [b, S, V] of an operation before, flattened: its output is what the gradient goes into."""
    logits, targets, upstream = make_inputs()
    hidden = logits[None].clone().requires_grad_()
    output = hidden * 1.0
    outputs = vocab_parallel_logprobs(output.flatten(0, 1), targets, vocab_size=VOCAB, overwrite_logits=True)
    gradient = differentiate(outputs, hidden, upstream, "both")[0]
    assert torch.equal(gradient, run(logits, targets, upstream)[2])
    assert torch.equal(output.detach()[0], gradient) and torch.equal(hidden.detach()[0], logits)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("of", BOTH)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_soft_cap_bends_the_logits_before_the_temperature(of: str, temperature: float, overwrite: bool) -> None:
    logits, targets, upstream = make_inputs()
    capped = 2.5 * torch.tanh(logits.double() / 2.5)
    *expected, slope = reference(capped, targets, upstream, temperature, of)
    settings: dict[str, Any] = {"temperature": temperature, "chunk_tokens": 5, "overwrite_logits": overwrite}
    found = run(logits, targets, upstream, of, softcap=2.5, **settings)
    assert_all_close(found, (*expected, slope * (1 - (capped / 2.5).square())), 4e-6)


def test_a_second_backward_is_exact_without_overwriting_and_raises_with_it() -> None:
    logits, targets, upstream = make_inputs()
    for overwrite in (False, True):
        x = logits.clone().requires_grad_()
        outputs = vocab_parallel_logprobs(x, targets, vocab_size=VOCAB, overwrite_logits=overwrite)
        first = differentiate(outputs, x, upstream, "both", retain=True)
        if overwrite:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                differentiate(outputs, x, upstream, "both")
        else:
            assert torch.equal(differentiate(outputs, x, upstream, "both"), first)


def test_overwriting_logits_that_another_operation_saved_raises() -> None:
    """exp saves its output for its backward, which runs after the logits are gone."""
    logits, targets, _ = make_inputs()
    before = logits.requires_grad_()
    outputs = vocab_parallel_logprobs(before.exp(), targets, vocab_size=VOCAB, overwrite_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[0].sum().backward()


def test_a_second_derivative_is_refused() -> None:
    """The backward is written by hand; differentiated again it would give a wrong number."""
    logits, targets, _ = make_inputs()
    logits.requires_grad_()
    outputs = vocab_parallel_logprobs(logits, targets, vocab_size=VOCAB)
    (gradient,) = torch.autograd.grad(outputs[0].square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("of", BOTH)
def test_only_the_outputs_that_reach_the_loss_cost_a_backward(monkeypatch: pytest.MonkeyPatch, of: str) -> None:
    """An output without a gradient comes as None, which is what skips its share of the work."""
    seen: list[tuple[bool, bool]] = []
    chunk_backward = vocab_logprobs._chunk_backward

    def spy(z: Tensor, targets: Tensor, statistics: Tensor, logprobs: Tensor | None, entropy: Tensor | None) -> Tensor:
        seen.append((logprobs is not None, entropy is not None))
        return chunk_backward(z, targets, statistics, logprobs, entropy)

    monkeypatch.setattr(vocab_logprobs, "_chunk_backward", spy)
    run(*make_inputs(), of, chunk_tokens=5)
    assert seen == [(of != "entropy", of != "logprobs")] * 3


class LargestFloat32(TorchDispatchMode):
    """Elements of the largest float32 tensor that an operation returned, and of the largest in any type."""

    def __init__(self) -> None:
        super().__init__()
        self.float32, self.any = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.any = max(self.any, x.numel())
                self.float32 = max(self.float32, x.numel() if x.dtype == torch.float32 else 0)
        return result


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("of", BOTH)
@pytest.mark.parametrize("rows", [None, torch.arange(0, 64, 2)])
def test_no_float32_tensor_is_larger_than_a_chunk(rows: Tensor | None, of: str, overwrite: bool) -> None:
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(64, 40, generator=g).bfloat16().requires_grad_()
    count = 64 if rows is None else len(rows)
    targets, upstream = torch.randint(37, (count,), generator=g), torch.randn(2, count, generator=g)
    with LargestFloat32() as largest:
        outputs = vocab_parallel_logprobs(
            logits, targets, vocab_size=37, rows=rows, temperature=0.7, chunk_tokens=8, overwrite_logits=overwrite
        )
        differentiate(outputs, logits, upstream, of)
    assert largest.float32 == 8 * 37
    assert largest.any == 64 * 40, "the mode must have seen the backward to prove anything"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("of", BOTH)
@pytest.mark.parametrize("tp_size", [2, 3, 5])  # of 3 ranks with 10 columns each, the last has padding only
def test_tensor_parallel_ranks_agree_with_the_whole_vocabulary(
    monkeypatch: pytest.MonkeyPatch, tp_size: int, of: str, overwrite: bool
) -> None:
    tp, (logits, targets, upstream) = SimulatedTP(tp_size), make_inputs()
    monkeypatch.setattr(dist, "all_reduce", tp.all_reduce)
    rows = torch.tensor([5, 1, 11, 8, 2, 12])
    chosen = (targets[rows], upstream[:, rows])
    settings: dict[str, Any] = {"temperature": 0.7, "chunk_tokens": 4, "overwrite_logits": overwrite}
    ranks = tp.run(logits, *chosen, of, rows=rows, **settings)
    for logprobs, entropy, _ in ranks:
        assert torch.equal(logprobs, ranks[0][0]) and torch.equal(entropy, ranks[0][1])
    expected = reference(logits[rows], *chosen, 0.7, of)
    gradient = torch.zeros(TOKENS, PADDED, dtype=torch.float64).index_copy(0, rows, expected[2])
    joined = (ranks[0][0], ranks[0][1], torch.cat([rank[2] for rank in ranks], dim=1))
    assert_all_close(joined, (*expected[:2], gradient), 4e-6)
