"""Attention over packed sequences against the same sequences one by one, on one rank and on context-parallel ones."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_rpp.experience.packing import zigzag
from megatron_rpp.model.layers import attention as core
from megatron_rpp.model.layers import capped_attention, packed_attention
from megatron_rpp.model.layers.attention import SDPACoreAttention

HEADS, GROUPS, WIDTH, VALUE_WIDTH = 4, 2, 6, 5  # latent attention has values of another width


def make(window: int | None, cap: float | None, cp_size: int = 1, cp_rank: int = 0) -> SDPACoreAttention:
    config: Any = SimpleNamespace(
        context_parallel_size=cp_size,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None if window is None else [1],
    )
    groups: Any = SimpleNamespace(cp=SimpleNamespace(size=lambda: cp_size, rank=lambda: cp_rank))
    return SDPACoreAttention(
        config, 1, AttnMaskType.causal, "self", softmax_scale=0.7, softcap=cap, pg_collection=groups
    )


def inputs(total: int) -> list[Tensor]:
    """query [T, heads, D], key [T, groups, D] and value [T, groups, Dv]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(total, HEADS, WIDTH), (total, GROUPS, WIDTH), (total, GROUPS, VALUE_WIDTH)]
    return [(torch.randn(shape, generator=generator) * 2).requires_grad_() for shape in shapes]


def one_by_one(tensors: list[Tensor], bounds: list[int], window: int | None, cap: float | None) -> Tensor:
    """[T, heads * Dv]: each sequence a batch of one, without packing."""
    parts = [make(window, cap)(*(x[a:b, None] for x in tensors), None)[:, 0] for a, b in pairwise(bounds)]
    return torch.cat(parts)


def on_ranks(
    tensors: list[Tensor], bounds: list[int], cp_size: int, settings: tuple[int | None, float | None],
    monkeypatch: pytest.MonkeyPatch,
) -> Tensor:  # fmt: skip
    """[T, heads * Dv] of all CP ranks; the gather gives each the others' keys and values, with their graph."""
    shares = zigzag(bounds, cp_size)
    dealt = torch.cat([torch.cat([tensors[1][own], tensors[2][own]], dim=-1) for own in shares])
    monkeypatch.setattr(packed_attention, "gather_from_sequence_parallel_region", lambda _, group: dealt)
    unreadable = torch.tensor(bounds, dtype=torch.int32, device="meta")  # no layer may wait for its device
    packed = packed_attention.slot_params(unreadable, tuple(bounds))
    outputs = [
        make(*settings, cp_size, rank)(*(x[own] for x in tensors), None, packed_seq_params=packed)
        for rank, own in enumerate(shares)
    ]
    return torch.cat(outputs)[shares.flatten().argsort()]


@pytest.mark.parametrize("block", [1024, 3])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 4, 7, 99])
@pytest.mark.parametrize(("cp_size", "bounds"), [(1, [0, 1, 9, 20]), (2, [0, 4, 16, 24]), (3, [0, 6, 24])])
def test_packed_sequences_attend_as_they_do_alone(
    cp_size: int, bounds: list[int], window: int | None, cap: float | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first slots are of one token, or of one in each chunk."""
    monkeypatch.setattr(capped_attention, "_CHUNK", block)
    monkeypatch.setattr(core, "_BLOCK", block)
    ours, plain = inputs(bounds[-1]), inputs(bounds[-1])
    found = on_ranks(ours, bounds, cp_size, (window, cap), monkeypatch)
    expected = one_by_one(plain, bounds, window, cap)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    assert found.shape == expected.shape == (bounds[-1], HEADS * VALUE_WIDTH)
    for x, y in [(found, expected), *((a.grad, b.grad) for a, b in zip(ours, plain, strict=True))]:
        assert x is not None and y is not None
        assert (x - y).abs().max() < 5e-6 * y.abs().max().clamp(min=1)


def test_no_token_sees_another_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = [0, 8, 16]
    before = on_ranks(inputs(16), bounds, 2, (None, None), monkeypatch)
    changed = [torch.cat([x[:8] * 5 + 1, x[8:]]).detach() for x in inputs(16)]
    after = on_ranks(changed, bounds, 2, (None, None), monkeypatch)
    assert torch.equal(before[8:], after[8:]) and not torch.allclose(before[:8], after[:8])


def test_padded_rows_are_refused_on_context_parallel_ranks() -> None:
    """They would attend to this rank's part alone, in silence."""
    rows = [x[:, None] for x in inputs(4)]
    with pytest.raises(AssertionError, match="only packed sequences"):
        make(None, None, cp_size=2)(*rows, None)
