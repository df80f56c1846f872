"""How the layout decides on microbatches: their number, their lengths, and what replicas agree on."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rpp.config.schema import TrainConfig
from megatron_rpp.engine import microbatches
from megatron_rpp.engine.microbatches import cut_batch
from megatron_rpp.experience.balance import SequenceCost
from megatron_rpp.experience.packing import Microbatch, cut
from megatron_rpp.experience.types import ExperienceBatch

LENGTHS = [30, 5, 4, 3, 9, 8, 0]
PACKED = TrainConfig(micro_batch_tokens=32)


def make_batch(lengths: list[int]) -> ExperienceBatch:
    mask = (torch.arange(max([*lengths, 1])) < torch.tensor(lengths, dtype=torch.int64)[:, None]).float()
    rows = torch.arange(len(lengths))
    return ExperienceBatch(mask.long(), mask, mask, rows.double(), rows)


def make_cut(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int] = LENGTHS, train: TrainConfig = PACKED, **layout: Any
) -> list[Microbatch]:
    """The cut on a layout whose settings stand in for those of a model."""
    settings = {
        "pp_size": 1, "vpp_size": 1, "tp_size": 1, "cp_size": 1, "cp_rank": 0, "ep_size": 1, "etp_size": 1,
        "dp_group": None, "device": torch.device("cpu"), **layout,
    }  # fmt: skip
    recipe = settings.pop("recipe", None)
    config = SimpleNamespace(
        sequence_parallel=settings["tp_size"] > 1,
        variable_seq_lengths=settings.pop("varies", False),
        fp8="hybrid" if recipe else None,
        fp8_recipe=recipe,
    )
    hf = SimpleNamespace(moe=settings.pop("moe", None))
    monkeypatch.setattr(microbatches, "sequence_cost", lambda hf: SequenceCost(1.0, 0.1))
    graph_length = settings.pop("graph_length", 0)
    parallel = SimpleNamespace(**settings)
    model: Any = SimpleNamespace(parallel=parallel, config=config, hf=hf, graph_length=graph_length)
    return cut_batch(model, make_batch(lengths), train)


def places(found: list[Microbatch]) -> list[int]:
    return sorted(i for micro in found for i in micro.index.tolist())


def test_packed_microbatches_have_their_own_lengths_where_nobody_minds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = make_cut(monkeypatch)
    assert sorted(micro.positions for micro in found) == [29, 30]
    assert places(found) == [0, 1, 2, 3, 4, 5]  # the last row predicts nothing


def test_stages_that_tell_each_other_lengths_need_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [m.positions for m in make_cut(monkeypatch, pp_size=2, varies=True)] == [
        m.positions for m in make_cut(monkeypatch)
    ]


def test_an_interleaved_schedule_gets_a_multiple_of_the_stages_all_of_one_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = make_cut(monkeypatch, [30, 20, 9], pp_size=2, vpp_size=2)
    assert [micro.positions for micro in found] == [30, 30]
    found = make_cut(monkeypatch, [30, 31, 32], pp_size=2, vpp_size=2)
    assert [micro.positions for micro in found] == [32] * 4 and places(found) == [0, 1, 2]


@pytest.mark.parametrize("train", [PACKED, TrainConfig(micro_batch_size=2)])
def test_replicas_that_share_experts_run_as_many_microbatches_of_the_same_length(
    monkeypatch: pytest.MonkeyPatch, train: TrainConfig
) -> None:
    """Their dispatchers would wait for each other for ever."""
    asked: list[list[int]] = []

    def largest(group: Any) -> Any:
        def with_another_replica(sizes: torch.Tensor) -> torch.Tensor:
            asked.append(sizes.tolist())
            return torch.maximum(sizes, torch.tensor([5, 48]))

        return with_another_replica

    monkeypatch.setattr(microbatches, "max_over", largest)
    found = make_cut(monkeypatch, [9, 4], train, moe=SimpleNamespace(), ep_size=2)
    assert asked == [[1, 13]] if train is PACKED else asked == [[2, 9]]
    expected = [48] * 5 if train is PACKED else [96] * 3  # 5 microbatches; 5 rows, two a microbatch
    assert [micro.positions for micro in found] == expected
    assert places(found) == [0, 1]


def test_each_ranks_share_suits_sequence_and_context_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    for cp_rank in range(2):
        for micro in make_cut(monkeypatch, tp_size=3, cp_size=2, cp_rank=cp_rank):
            assert micro.tokens.shape[1] * 2 == micro.positions and micro.tokens.shape[1] % 3 == 0


@pytest.mark.parametrize("train", [PACKED, TrainConfig(micro_batch_size=2)])
def test_a_replica_without_rows_runs_a_microbatch_all_the_same(
    monkeypatch: pytest.MonkeyPatch, train: TrainConfig
) -> None:
    found = make_cut(monkeypatch, [], train)
    assert len(found) == 1 and places(found) == [] and found[0].rows.loss_mask.sum() == 0


@pytest.mark.parametrize(("tp_size", "cp_size"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(("recipe", "multiple"), [("tensorwise", 16), ("mxfp8", 32), ("blockwise", 128)])
def test_each_rank_has_whole_blocks_of_tokens_in_fp8(
    monkeypatch: pytest.MonkeyPatch, recipe: str, multiple: int, tp_size: int, cp_size: int
) -> None:
    found = make_cut(monkeypatch, recipe=recipe, tp_size=tp_size, cp_size=cp_size)
    assert all(micro.tokens.numel() % (multiple * tp_size) == 0 for micro in found)
    assert places(found) == [0, 1, 2, 3, 4, 5]
    if cp_size == 1:
        rows = make_cut(monkeypatch, LENGTHS, TrainConfig(micro_batch_size=3), recipe=recipe, tp_size=tp_size)
        assert all(micro.tokens.shape[1] % tp_size == 0 for micro in rows)
        assert all(micro.tokens.numel() // tp_size % multiple == 0 for micro in rows)
        assert rows[0].tokens.shape[1] < 30 + multiple * tp_size, "no more padding than that"


def test_padded_rows_together_make_up_fp8s_multiple(monkeypatch: pytest.MonkeyPatch) -> None:
    found = make_cut(monkeypatch, [30, 9], TrainConfig(micro_batch_size=8), recipe="tensorwise")
    assert [micro.tokens.shape for micro in found] == [(8, 30)]  # 240 tokens are 15 blocks already


def test_replicas_that_agree_on_delayed_scales_run_as_many_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each microbatch ends with a collective over them."""
    asked: list[list[int]] = []

    def largest(group: Any) -> Any:
        return lambda sizes: asked.append(sizes.tolist()) or torch.maximum(sizes, torch.tensor([3, 0]))

    monkeypatch.setattr(microbatches, "max_over", largest)
    found = make_cut(monkeypatch, [9, 4], recipe="delayed")
    assert asked == [[1, 0]] and [micro.positions for micro in found] == [16, 16, 16]
    make_cut(monkeypatch, [9, 4], recipe="tensorwise")
    assert len(asked) == 1


def test_rows_of_cuda_graphs_have_one_shape_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron refuses to replay a graph on another one. What heads see of the rows is what it was."""
    train = TrainConfig(micro_batch_size=4)
    for lengths in (LENGTHS, [3], []):
        plain = make_cut(monkeypatch, lengths, train)
        found = make_cut(monkeypatch, lengths, train, graph_length=40)
        assert {tuple(micro.tokens.shape) for micro in found} == {(4, 40)}
        assert len(found) == len(plain) and places(found) == places(plain)
        for a, b in zip(found, plain, strict=True):
            width = b.tokens.shape[1]
            assert torch.equal(a.rows.loss_mask[:, :width], b.rows.loss_mask) and a.rows.loss_mask[:, width:].sum() == 0


def test_policy_and_reference_share_the_search_for_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[list[int]] = []

    def search(lengths: Sequence[int], *args: Any, **settings: Any) -> list[list[int]]:
        searches.append(list(lengths))
        return cut(lengths, *args, **settings)

    monkeypatch.setattr(microbatches, "cut", search)
    lengths = [13, 11, 31, 7]  # of no other test: the cache outlives them
    first = make_cut(monkeypatch, lengths)
    second = make_cut(monkeypatch, lengths)
    assert [m.index.tolist() for m in first] == [m.index.tolist() for m in second] and len(searches) == 1
    make_cut(monkeypatch, lengths, pp_size=2, vpp_size=2)
    make_cut(monkeypatch, lengths, TrainConfig(micro_batch_tokens=64))
    assert len(searches) == 3, "another layout or budget is another cut"
