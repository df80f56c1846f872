"""Core attention against attention written out: windows, soft caps, scale and grouped queries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_rpp.model.layers import capped_attention
from megatron_rpp.model.layers.attention import SDPACoreAttention

LENGTH, WIDTH, LAYERS = 11, 6, (1, 0)  # the first layer slides, the second does not


def attention(layer_number: int = 1, window: int | None = None, **settings: Any) -> SDPACoreAttention:
    config: Any = SimpleNamespace(
        context_parallel_size=1,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None if window is None else list(LAYERS),
    )
    return SDPACoreAttention(config, layer_number, AttnMaskType.causal, "self", **settings)


def inputs() -> list[Tensor]:
    """query [S, B, 4 heads, D]; key and value [S, B, 2 groups, D]; large enough that a cap bends the scores."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(LENGTH, 3, heads, WIDTH) for heads in (4, 2, 2)]
    return [(torch.randn(shape, generator=generator) * 2).requires_grad_() for shape in shapes]


def written_out(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, cap: float | None) -> Tensor:
    """One query at a time, in float64: [S, B, 4 heads * D]."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2)
    rows = []
    for t in range(LENGTH):
        seen = slice(max(0, t - window + 1), t + 1)
        scores = torch.einsum("bhd,sbhd->bhs", q[t], k[seen]) * scale
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        rows.append(torch.einsum("bhs,sbhd->bhd", scores.softmax(-1), v[seen]).flatten(1))
    return torch.stack(rows)


def assert_near(found: Tensor | None, expected: Tensor | None) -> None:
    """Within float32 rounding of the largest value; at a window of 1 the gradients of q and k cancel to nothing."""
    assert found is not None and expected is not None and found.shape == expected.shape
    assert (found - expected).abs().max() < 5e-6 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("chunk", [256, 4])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 5, LENGTH, 99])
def test_output_and_gradients_are_those_of_attention_written_out(
    window: int | None, cap: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk of 4 has first keys within, before and at the window's edge, and is computed again in the backward."""
    monkeypatch.setattr(capped_attention, "_CHUNK", chunk)
    ours, plain = inputs(), inputs()
    weight = torch.randn(LENGTH, 3, 4 * WIDTH, generator=torch.Generator().manual_seed(1))
    found = attention(window=window, softcap=cap, softmax_scale=0.7)(*ours, None)
    expected = written_out(*plain, window or LENGTH, 0.7, cap)
    assert_near(found, expected)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for x, y in zip(ours, plain, strict=True):
        assert_near(x.grad, y.grad)


@pytest.mark.parametrize("cap", [None, 1.5])
def test_without_a_scale_scores_are_divided_by_the_root_of_the_head_size(cap: float | None) -> None:
    found, expected = attention(softcap=cap)(*inputs(), None), written_out(*inputs(), LENGTH, WIDTH**-0.5, cap)
    assert_near(found, expected)


@pytest.mark.parametrize(("layer_number", "window"), [(1, 3), (2, LENGTH)])
def test_only_the_layers_that_slide_have_a_window(layer_number: int, window: int) -> None:
    """Layer numbers count from 1, over all pipeline stages."""
    found = attention(layer_number, window=3, softmax_scale=1.0)(*inputs(), None)
    assert_near(found, written_out(*inputs(), window, 1.0, None))


def test_capped_scores_keep_float32_where_queries_are_bfloat16() -> None:
    """A score near 60 is rounded by up to an eighth in bfloat16: its weight would be wrong by an eighth."""
    q = torch.full((2, 1, 1, 1), 60.0, dtype=torch.bfloat16)
    k = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16).view(2, 1, 1, 1)  # scores 60 and 60.47
    v = torch.tensor([0.0, 1.0], dtype=torch.bfloat16).view(2, 1, 1, 1)
    found = attention(softcap=1e4, softmax_scale=1.0)(q, k, v, None)[1].item()
    assert found == pytest.approx(torch.sigmoid(torch.tensor(60 * 0.0078125)).item(), abs=2e-3)
