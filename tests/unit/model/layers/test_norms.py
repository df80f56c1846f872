"""Zero-centred norms as Gemma computes them, and the norm between a sublayer and its residual."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from megatron_rpp.model.layers.norms import NormThenAdd, RMSNorm

WIDTH = 64


def config(dtype: torch.dtype = torch.float32, zero_centered: bool = True) -> Any:
    return SimpleNamespace(
        layernorm_zero_centered_gamma=zero_centered,
        params_dtype=dtype,
        sequence_parallel=True,
        hidden_size=WIDTH,
        layernorm_epsilon=1e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_centred_norm_is_gemmas(dtype: torch.dtype) -> None:
    ours, theirs = RMSNorm(config(dtype), WIDTH, 1e-6), Gemma2RMSNorm(WIDTH, 1e-6).to(dtype)
    weight, x = (torch.randn(WIDTH) * 0.3).to(dtype), torch.randn(5, 3, WIDTH).to(dtype)
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
    found, expected = ours(x), theirs(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected.float(), atol=0, rtol=torch.finfo(dtype).eps)


def test_a_small_weight_is_not_lost_in_bfloat16() -> None:
    """1 + 0.003 is 1 in bfloat16."""
    norm, x = RMSNorm(config(torch.bfloat16), WIDTH), torch.rand(500, WIDTH, dtype=torch.bfloat16)
    before = norm(x).double().sum()
    norm.weight.data.fill_(0.003)
    assert (norm(x).double().sum() / before).item() == pytest.approx(1.003, abs=5e-4)


def test_a_fresh_norm_scales_by_one_and_its_gradient_is_summed_over_sequence_parallel_ranks() -> None:
    x = torch.randn(4, WIDTH)
    for zero_centered in (False, True):
        norm = RMSNorm(config(zero_centered=zero_centered), WIDTH)
        torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(4), atol=1e-4, rtol=0)
        assert norm.weight.sequence_parallel  # type: ignore[attr-defined]


@pytest.mark.parametrize("training", [False, True])
def test_the_norm_is_of_the_output_alone_and_neither_input_changes(training: bool) -> None:
    """Megatron's own sum is made in place outside of training."""
    module = NormThenAdd(config(), RMSNorm)
    module.norm.weight.data.normal_()
    output, residual = torch.randn(5, 2, WIDTH), torch.randn(5, 2, WIDTH)
    expected, kept = residual + module.norm(output), (output.clone(), residual.clone())
    with torch.no_grad():
        found = module(training, False)((output, None), residual, 0.0)
    assert torch.equal(found, expected)
    assert torch.equal(output, kept[0]) and torch.equal(residual, kept[1])
