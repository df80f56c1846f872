"""The fused log-probs against the chunked ones and float64, and what they may not do: copy logits, compile anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters

from megatron_rpp.parallel import fused_logprobs
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

LARGE = 4096  # vocabulary where logits are much larger than what is kept a token
pytestmark = pytest.mark.timeout(300)  # the first test compiles


@pytest.mark.parametrize("of", BOTH)
@pytest.mark.parametrize("overwrite", [False, True])
def test_fused_equals_chunked_and_float64(of: str, overwrite: bool) -> None:
    inputs = make_inputs()
    settings: dict[str, Any] = {"temperature": 0.7, "overwrite_logits": overwrite}
    found = run(*inputs, of, fused=True, **settings)
    chunked = run(*inputs, of, **settings)
    for a, b in zip(found[:2], chunked[:2], strict=True):
        assert (a - b).abs().max() < 1e-6
    assert (found[2] - chunked[2]).norm() < 1e-6 * chunked[2].norm()
    assert_all_close(found, reference(*inputs, 0.7, of), 4e-6)
    assert (found[2][:, VOCAB:] == 0).all(), "padding columns hold the largest logits of all"


def test_bfloat16_logits_are_summed_in_float32_and_the_gradient_rounded_once() -> None:
    g = torch.Generator().manual_seed(5)
    logits, targets = torch.randn(64, LARGE, generator=g).bfloat16() * 2, torch.randint(LARGE, (64,), generator=g)
    found, expected = ([x.clone().requires_grad_()] for x in (logits, logits.double()))
    for x, fused in ((found, True), (expected, False)):
        x += vocab_parallel_logprobs(x[0], targets, vocab_size=LARGE, temperature=0.7, fused=fused)
        x[1:] = [*x[1:], differentiate((x[1], x[2]), x[0], torch.randn(2, 64, generator=g.manual_seed(6)), "both")]
    for a, b in zip(found[1:3], expected[1:3], strict=True):
        assert a.dtype == torch.float32 and (a - b).abs().max() < 4e-6
    assert found[3].dtype == torch.bfloat16
    torch.testing.assert_close(found[3].double(), expected[3], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("overwrite", [False, True])
def test_rows_are_selected_in_any_order_and_other_rows_get_zero_gradient(overwrite: bool) -> None:
    """What the other rows hold, here NaN, does not matter."""
    logits, targets, upstream = make_inputs()
    rows = torch.tensor([9, 2, 3, 12, 0, 7])
    chosen = (targets[rows], upstream[:, rows])
    expected = run(logits[rows], *chosen, temperature=0.7)
    others = [i for i in range(TOKENS) if i not in rows.tolist()]
    logits[others] = torch.nan
    found = run(logits, *chosen, rows=rows, temperature=0.7, overwrite_logits=overwrite, fused=True)
    assert_all_close((*found[:2], found[2][rows]), tuple(x.double() for x in expected), 2e-6)
    assert (found[2][others] == 0).all()


def test_a_soft_cap_bends_the_logits_before_the_temperature() -> None:
    logits, targets, upstream = make_inputs()
    capped = 2.5 * torch.tanh(logits.double() / 2.5)
    *expected, slope = reference(capped, targets, upstream, 0.6)
    found = run(logits, targets, upstream, temperature=0.6, softcap=2.5, fused=True)
    assert_all_close(found, (*expected, slope * (1 - (capped / 2.5).square())), 4e-6)


def test_huge_logits_neither_overflow_nor_give_nan() -> None:
    """At 1e5, float32 itself is off by 0.01 in what is divided by the temperature, in both forms alike."""
    logits, targets, upstream = make_inputs(scale=1e4)
    found, expected = (run(logits + 1e5, targets, upstream, temperature=0.7, fused=fused) for fused in (True, False))
    for a, b in zip(found, expected, strict=True):
        assert torch.isfinite(a).all() and ((a - b).abs() <= 1e-6 * b.abs() + 1e-6).all()


@pytest.mark.parametrize("rows", [None, torch.zeros(0, dtype=torch.int64)])
def test_no_tokens_give_an_empty_result_and_a_zero_gradient(rows: Tensor | None) -> None:
    logits = torch.randn(0 if rows is None else 5, PADDED, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    outputs = vocab_parallel_logprobs(logits, none, vocab_size=VOCAB, rows=rows, fused=True)
    (outputs[0].sum() + outputs[1].sum()).backward()
    assert outputs[0].numel() == outputs[1].numel() == 0
    assert logits.grad is not None and (logits.grad == 0).all()


def test_overwriting_writes_over_the_logits_and_refuses_a_second_backward() -> None:
    logits, targets, upstream = make_inputs()
    x = logits.clone().requires_grad_()
    outputs = vocab_parallel_logprobs(x, targets, vocab_size=VOCAB, temperature=0.7, overwrite_logits=True, fused=True)
    assert torch.equal(x, logits), "only the backward overwrites"
    gradient = differentiate(outputs, x, upstream, "both", retain=True)
    assert gradient.data_ptr() == x.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        differentiate(outputs, x, upstream, "both")


def test_tensor_parallel_ranks_agree_with_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 ranks the second has some padding columns, and the last nothing else."""
    tp, (_, _, upstream) = SimulatedTP(3, patience_s=120), make_inputs()
    g, vocab = torch.Generator().manual_seed(7), PADDED + VOCAB
    logits, targets = torch.randn(TOKENS, 3 * PADDED, generator=g) * 3, torch.randint(vocab, (6,), generator=g)
    targets[:2] = torch.tensor([0, vocab - 1])
    settings: dict[str, Any] = {"rows": torch.tensor([5, 1, 11, 8, 2, 12]), "temperature": 0.7, "vocab_size": vocab}
    expected = run(logits, targets, upstream[:, :6], **settings)
    monkeypatch.setattr(dist, "all_reduce", tp.all_reduce)
    ranks = tp.run(logits, targets, upstream[:, :6], overwrite_logits=True, fused=True, **settings)
    for logprobs, entropy, _ in ranks:
        assert torch.equal(logprobs, ranks[0][0]) and torch.equal(entropy, ranks[0][1])
    joined = (ranks[0][0], ranks[0][1], torch.cat([rank[2] for rank in ranks], dim=1))
    assert_all_close(joined, tuple(x.double() for x in expected), 4e-6)


@contextlib.contextmanager
def compilations() -> Iterator[list[int]]:
    """How often a kernel is compiled inside."""
    before, found = counters["stats"]["unique_graphs"], [0]
    yield found
    found[0] = counters["stats"]["unique_graphs"] - before


def one_pass(tokens: int, selected: int, vocab: int = VOCAB) -> None:
    logits = torch.randn(tokens, PADDED, requires_grad=True)
    rows = torch.randperm(tokens)[:selected]
    targets = torch.randint(vocab, (selected,))
    outputs = vocab_parallel_logprobs(
        logits, targets, vocab_size=vocab, rows=rows, temperature=0.7, overwrite_logits=True, fused=True
    )
    outputs[0].sum().backward()


def test_microbatches_of_any_length_share_two_kernels() -> None:
    """Each is of another length; a compilation takes seconds on a GPU, too."""
    torch._dynamo.reset()
    with compilations() as count:
        one_pass(16, 16)  # equal at first, which must not bind them together
    assert count == [2], "a forward and a backward"
    with compilations() as count:
        for tokens, selected in [(17, 16), (64, 2), (33, 33), (100, 57), (8, 7), (16, 3)]:
            one_pass(tokens, selected)
    assert count == [0]


def test_too_many_compilations_raise_rather_than_run_unfused() -> None:
    """torch would go on without the compiler, and put float32 logits into memory."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        one_pass(6, 5)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            run(*make_inputs(), softcap=3.0, fused=True)
    torch._dynamo.reset()


def allocated(logits: Tensor, targets: Tensor, **settings: Any) -> tuple[int, int]:
    """Peak of the bytes that (forward, backward) allocate beside the logits and what is handed on, by the profiler."""
    x = logits.clone().requires_grad_()
    peaks = []
    for step in ("forward", "backward"):
        with torch.profiler.profile(profile_memory=True) as profile:
            if step == "forward":
                outputs = vocab_parallel_logprobs(x, targets, vocab_size=x.shape[1], **settings)
            else:
                differentiate(outputs, x, torch.ones(2, len(targets)), "both")
        assert profile.profiler is not None
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        peaks.append(max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))))
    return peaks[0], peaks[1]


def test_neither_pass_puts_logits_in_memory_again() -> None:
    """Float32 logits would be 4 bytes an element, a copy of them 2."""
    tokens, vocab = 256, LARGE
    logits, targets = torch.randn(tokens, vocab).bfloat16(), torch.randint(vocab, (tokens,))
    settings: dict[str, Any] = {"temperature": 0.7, "overwrite_logits": True}
    allocated(logits, targets, fused=True, **settings)  # compiles
    for peak in allocated(logits, targets, fused=True, **settings):
        assert 0 < peak < 0.1 * tokens * vocab
    unfused = allocated(logits, targets, chunk_tokens=tokens, **settings)
    assert min(unfused) > 4 * tokens * vocab, "the measurement sees what the chunked form allocates"


def test_the_kernels_are_compiled() -> None:
    """megatron's own torch.compile is off on CPU (device.cpu); these are what CI must test."""
    torch._dynamo.reset()
    with compilations() as count:
        fused_logprobs._statistics(torch.randn(3, 8), torch.arange(3), torch.arange(3), 8, 1.0, None)
    assert count == [1]


def test_a_trial_compiles_and_runs_both_kernels_and_leaves_nothing_behind() -> None:
    """What they are compiled for later must not be more general, and slower, for the trial's few columns."""
    torch._dynamo.reset()
    with compilations() as count:
        assert fused_logprobs.why_not_fused() is None
    assert count == [2]
    assert not torch._dynamo.convert_frame.output_codes.seen
    assert torch._inductor.config.compile_threads == 1, "in this process, and in no pool of 32 others"
