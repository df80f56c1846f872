"""Each transform: where every row lands, and split -> merge bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_rpp.model.hf_config import HFConfig, Rope
from megatron_rpp.model.hf_mapping.transforms import QKV, Direct, GateUp, MergedGateUp, Shard, Transform, Vocab

MODEL = HFConfig(
    architecture="LlamaForCausalLM",
    num_layers=1,
    hidden_size=10,
    ffn_hidden_size=24,
    num_attention_heads=16,
    num_query_groups=8,
    head_dim=3,
    vocab_size=19,
    norm_eps=1e-6,
    rope=Rope(1e4),
    max_position_embeddings=64,
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
)


def split_all(
    transform: Transform, hf: list[Tensor], dim: int | None, tp: int, rows: int = 0, model: HFConfig = MODEL
) -> list[Tensor]:
    return [transform.split(hf, Shard(dim, rank, tp, rows), model) for rank in range(tp)]


CASES = {
    "direct_replicated": (Direct(), [(10,)], None),
    "direct_columns": (Direct(), [(10, 48)], 1),
    "direct_rows": (Direct(), [(48, 10)], 0),
    "gate_up": (GateUp(), [(24, 10), (24, 10)], 0),
    "merged_gate_up": (MergedGateUp(), [(48, 10)], 0),
    "qkv_weight": (QKV(), [(48, 10), (24, 10), (24, 10)], 0),
    "qkv_bias": (QKV(), [(48,), (24,), (24,)], 0),
    "vocab": (Vocab(), [(19, 10)], 0),
}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_merge_of_the_splits_is_bit_for_bit_the_original(case: str, dtype: torch.dtype, tp: int) -> None:
    transform, shapes, dim = CASES[case]
    hf = [torch.randn(shape).to(dtype) for shape in shapes]
    shards = split_all(transform, hf, dim, tp, rows=24 // tp)  # `rows` matters to Vocab only
    assert dim is None or sum(s.numel() for s in shards) == (240 if case == "vocab" else sum(t.numel() for t in hf))
    merged = transform.merge(shards, dim, MODEL)
    assert len(merged) == len(hf)
    for found, original in zip(merged, hf, strict=True):
        assert found.dtype == dtype and torch.equal(found, original)


def test_qkv_interleaves_two_queries_a_key_and_a_value_per_group_and_ranks_get_whole_groups() -> None:
    """4 heads of 1 row in 2 groups: heads 0, 1 read group 0. Megatron's order is q q k v, q q k v."""
    model = replace(MODEL, num_attention_heads=4, num_query_groups=2, head_dim=1)
    hf = [torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11]), torch.tensor([20.0, 21])]
    whole = QKV().split(hf, Shard(0, 0, 1, 8), model)
    assert whole.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    halves = [QKV().split(hf, Shard(0, rank, 2, 4), model).tolist() for rank in (0, 1)]
    assert halves == [[0, 1, 10, 20], [2, 3, 11, 21]]


def test_qkv_keeps_the_rows_of_a_head_together() -> None:
    """2 heads of 2 rows in 1 group."""
    model = replace(MODEL, num_attention_heads=2, num_query_groups=1, head_dim=2)
    hf = [torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11]), torch.tensor([20.0, 21])]
    shard = QKV().split(hf, Shard(0, 0, 1, 8), model)
    assert shard.tolist() == [0, 1, 2, 3, 10, 11, 20, 21]
    assert [t.tolist() for t in QKV().merge([shard], 0, model)] == [t.tolist() for t in hf]


def test_gate_up_ranks_hold_their_gate_rows_then_their_up_rows() -> None:
    """Cutting the concatenation [gate; up] in two would give rank 0 the whole gate."""
    hf = [torch.tensor([[0.0], [1]]), torch.tensor([[10.0], [11]])]
    model = replace(MODEL, ffn_hidden_size=2)
    assert [s.flatten().tolist() for s in split_all(GateUp(), hf, 0, 2, model=model)] == [[0, 10], [1, 11]]


def test_merged_gate_up_ranks_hold_rows_of_both_halves() -> None:
    hf = [torch.tensor([[0.0], [1], [10], [11]])]
    model = replace(MODEL, ffn_hidden_size=2)
    assert [s.flatten().tolist() for s in split_all(MergedGateUp(), hf, 0, 2, model=model)] == [[0, 10], [1, 11]]


def test_vocab_pads_with_zero_rows_at_the_end_only() -> None:
    shards = split_all(Vocab(), [torch.arange(1.0, 20)[:, None]], 0, 4, rows=6)
    assert [s.flatten().tolist() for s in shards] == [
        [1, 2, 3, 4, 5, 6],
        [7, 8, 9, 10, 11, 12],
        [13, 14, 15, 16, 17, 18],
        [19, 0, 0, 0, 0, 0],
    ]


def test_direct_splits_along_the_given_dimension() -> None:
    full = torch.tensor([[0.0, 1, 2, 3], [4, 5, 6, 7]])
    assert Direct().split([full], Shard(1, 1, 2, 2), MODEL).tolist() == [[2, 3], [6, 7]]
    assert Direct().split([full], Shard(0, 1, 2, 1), MODEL).tolist() == [[4, 5, 6, 7]]
    assert torch.equal(Direct().split([full], Shard(None, 1, 2, 2), MODEL), full)
