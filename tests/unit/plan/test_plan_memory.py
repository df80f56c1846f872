"""`rpp plan` of what off-loading, recomputing and FP8 change, by hand for Llama 3 8B on one GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config.fields import build
from megatron_rpp.engine.host_copy import BLOCK_BYTES
from megatron_rpp.plan import Plan, StageMemory, plan, suggest, table
from megatron_rpp.plan.memory import GIB, RESERVE_BYTES
from tests.support.llama3 import LLAMA3_8B

TOTAL, TOKENS, HIDDEN = 8_030_261_248, 2048, 4096
A_LAYERS_MATRICES = HIDDEN * (6144 + 4096 + 3 * 14336)
ALL = ("optimizer", "gradients", "reference")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    (path / "config.json").write_text(json.dumps(LLAMA3_8B))
    return path


def planned(model: Path, **changes: Any) -> Plan:
    return plan(build(settings(model, **changes)))


def settings(model: Path, **changes: Any) -> dict[str, Any]:
    """`memory__offload` is memory.offload."""
    base = {
        "model.path": str(model),
        "model.dtype": "bfloat16",
        "optimizer.distributed": False,
        "rollout.context_length": TOKENS,
        "train.micro_batch_size": 1,
    }
    return base | {key.replace("__", "."): value for key, value in changes.items()}


def stage_of(model: Path, **changes: Any) -> StageMemory:
    (stage,) = planned(model, **changes).stages
    return stage


def test_what_is_offloaded_is_not_beside_the_servers_and_the_reference_not_beside_training(model: Path) -> None:
    all_there, away = stage_of(model), stage_of(model, memory__offload=ALL)
    policy, gradients, optimizer, reference = 2 * TOTAL, 4 * TOTAL, 12 * TOTAL, 2 * TOTAL
    assert all_there.sampling_bytes == policy + gradients + optimizer + reference + 2 * 256 * 2**20
    assert away.sampling_bytes == policy + 2 * 256 * 2**20
    assert away.peak_bytes == all_there.peak_bytes - reference
    assert all_there.host_bytes == 0
    blocks = -(-optimizer // BLOCK_BYTES) + -(-reference // BLOCK_BYTES)
    assert away.host_bytes == blocks * BLOCK_BYTES


@pytest.mark.parametrize("part", ALL)
def test_each_part_leaves_by_itself(model: Path, part: str) -> None:
    all_there, away = stage_of(model), stage_of(model, memory__offload=(part,))
    size = {"optimizer": 12, "gradients": 4, "reference": 2}[part] * TOTAL
    assert all_there.sampling_bytes - away.sampling_bytes == size
    if part != "reference":  # gradients and optimizer are there in training, which needs more than scoring
        assert away.peak_bytes == all_there.peak_bytes


def test_where_the_reference_alone_leaves_scoring_may_need_most(model: Path) -> None:
    """Scoring keeps no activations, but has the reference: here it is larger than they are."""
    small = {"rollout__context_length": 64, "rollout__max_response_tokens": 32}
    stage = stage_of(model, memory__offload=("reference",), **small)
    assert stage.activation_bytes < stage.reference_bytes
    assert stage.peak_bytes == stage.resident_bytes + stage.logits_bytes + stage.working_bytes


def test_servers_that_sleep_while_training_have_the_room_of_what_is_offloaded(model: Path) -> None:
    beside = {"rollout__release_memory": True, "slurm__rollout_nodes": 0}
    found = planned(model, memory__offload=ALL, **beside)
    taken = 2 * TOTAL + 2 * 256 * 2**20 + RESERVE_BYTES
    assert found.left_for_kv_cache(141 * GIB) == 141 * GIB - taken - 2 * TOTAL
    assert found.host_bytes == found.worst.host_bytes  # one GPU
    text = table.text(found, 141 * GIB)
    assert f"off-loaded while servers sample: {found.host_bytes / GIB:.1f} GiB of a node's host memory" in text
    assert table.as_json(found, 141 * GIB)["host_bytes"] == found.host_bytes
    assert "off-loaded" not in table.text(planned(model, **beside), 141 * GIB)


def test_fp8_keeps_two_copies_of_each_matrix(model: Path) -> None:
    stage, bf16 = stage_of(model, fp8__recipe="tensorwise"), stage_of(model)
    copies = 2 * 32 * A_LAYERS_MATRICES
    assert (stage.parameter_bytes, stage.copies_bytes) == (2 * TOTAL, copies)
    assert stage.reference_bytes == 2 * TOTAL + copies
    assert stage.resident_bytes == bf16.resident_bytes + 2 * copies
    assert bf16.copies_bytes == 0


def test_copies_leave_with_what_is_offloaded_but_not_from_graphs_or_parameters(model: Path) -> None:
    """The reference's are counted with it. In training they are all there."""
    fp8 = {"fp8__recipe": "tensorwise"}
    graphs, params = {"train__cuda_graphs": True}, {"fp8__params": True, "optimizer__distributed": True}
    for settings, dropped in ((fp8, 2), ({**fp8, **graphs}, 0), ({**fp8, **params}, 0)):
        there, away = stage_of(model, **settings), stage_of(model, memory__offload=("optimizer",), **settings)
        leaves = there.sampling_bytes - away.sampling_bytes - there.optimizer_bytes
        assert leaves == dropped * 32 * A_LAYERS_MATRICES
        assert away.peak_bytes == there.peak_bytes


def test_fp8_parameters_are_one_of_the_copies(model: Path) -> None:
    matrices = 32 * A_LAYERS_MATRICES
    stage = stage_of(model, fp8__recipe="tensorwise", fp8__params=True, optimizer__distributed=True)
    assert stage.parameter_bytes == pytest.approx(2 * TOTAL - matrices, rel=1e-5)  # buffers are padded
    assert stage.copies_bytes == matrices
    assert stage.optimizer_bytes == 12 * TOTAL


def test_blocks_have_a_scale_each_way_and_layers_in_bf16_have_none(model: Path) -> None:
    narrow = 29 * A_LAYERS_MATRICES
    stage = stage_of(model, fp8__recipe="blockwise", fp8__bf16_first_layers=1, fp8__bf16_last_layers=2)
    assert stage.copies_bytes == 2 * narrow + 2 * 4 * narrow // 128**2
    text = table.text(planned(model, fp8__recipe="blockwise"), 141 * GIB)
    assert "copies" in text and "copies" not in table.text(planned(model), 141 * GIB)


def test_full_recomputation_keeps_a_layers_input_alone_and_one_layer_at_a_time(model: Path) -> None:
    split = {"parallel__pipeline": 2}  # the first stage: no logits, and two microbatches in flight
    kept = planned(model, **split).stages[0]
    again = planned(model, **split, memory__recompute="full").stages[0]
    hidden = TOKENS * HIDDEN * 2
    assert again.activation_bytes == pytest.approx(2 * 16 * hidden, rel=0.2)  # and the angles
    layer = (kept.activation_bytes - again.activation_bytes) / (2 * 16)
    largest_gradient, handed_on = 2 * HIDDEN * 128256, 2 * hidden
    assert again.working_bytes - largest_gradient - handed_on == pytest.approx(layer + hidden, rel=0.001)
    assert kept.working_bytes == largest_gradient + handed_on


def test_a_layer_that_is_computed_again_stands_beside_no_logits(model: Path) -> None:
    """Which take more than it here, so that nothing is added to them."""
    kept, again = stage_of(model), stage_of(model, memory__recompute="full")
    assert again.working_bytes == kept.working_bytes and again.logits_bytes == kept.logits_bytes


@pytest.mark.parametrize("modules", [("core_attn",), ("mlp",), ("core_attn", "mlp")])
def test_selected_modules_keep_less_than_none_and_more_than_full(model: Path, modules: tuple[str, ...]) -> None:
    chosen = {"memory__recompute": "selective", "memory__recompute_modules": modules}
    none, some, full = stage_of(model), stage_of(model, **chosen), stage_of(model, memory__recompute="full")
    assert full.activation_bytes < some.activation_bytes < none.activation_bytes


def test_modules_whose_output_alone_is_dropped_are_counted_as_kept(model: Path) -> None:
    chosen = {"memory__recompute": "selective", "memory__recompute_modules": ("layernorm",)}
    assert stage_of(model, **chosen).activation_bytes == stage_of(model).activation_bytes


def test_what_costs_time_is_proposed_only_where_no_free_setting_is_enough(model: Path) -> None:
    split = {"parallel__tensor": 8, "parallel__sequence": True, "optimizer__distributed": True}
    split |= {"rollout__context_length": 8192, "slurm__rollout_nodes": 1}
    wide = build(settings(model, **split, train__micro_batch_size=4))
    free = suggest(wide, 8, plan(wide).needed_bytes - 1)
    assert free is not None and str(free) == "--train.micro_batch_size=1"
    narrow = build(settings(model, **split))
    slower = suggest(narrow, 8, plan(narrow).needed_bytes - 1)
    assert slower is not None and str(slower) == "--memory.recompute=full"


def test_offloading_is_proposed_for_servers_that_have_no_room(model: Path) -> None:
    split = {"parallel__tensor": 8, "parallel__sequence": True, "optimizer__distributed": True}
    config = build(settings(model, **split, rollout__release_memory=True, rollout__server_tensor=1))
    enough = plan(build(settings(model, **split, rollout__release_memory=True, memory__offload=ALL))).needed_bytes
    best = suggest(config, 8, enough)
    assert best is not None and best.settings.get("memory.offload") == ALL
    assert "--memory.offload=optimizer,gradients,reference" in str(best)
