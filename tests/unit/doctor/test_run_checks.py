"""Checks of the run itself: its model, its layout, and the room that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config import Config
from megatron_rpp.doctor.checks import disk, layout, memory, model
from megatron_rpp.doctor.places import Places
from tests.support.tokenizer_dirs import write_fast

Make = Callable[..., Config]


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[Path]:
    """A directory with config, weights and tokenizer that belong together."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path / "whole"
    torch.manual_seed(0)
    ids = write_fast(path)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(ids), **shape)).save_pretrained(path)
    yield path


def look(path: Path) -> dict[str, Any]:
    return model.measure(str(path), False, False)


def test_a_whole_model_passes_and_its_parameters_are_counted(whole: Path) -> None:
    from transformers import AutoModelForCausalLM

    answer = look(whole)
    assert answer["wrong"] == {}
    assert answer["parameters"] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(whole).parameters())


def test_a_missing_tokenizer_a_cut_file_and_other_contents_are_told_apart(whole: Path) -> None:
    right = look(whole)
    (whole / "generation_config.json").write_text("{}")
    other = look(whole)
    for file in whole.glob("tokenizer*"):
        file.unlink()
    bare = look(whole)
    weights = whole / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    cut = look(whole)
    answers = {"node1": right, "node2": right, "node3": other, "node4": bare, "node5": cut}
    found = [(f.node, f.found) for f in model.judge(answers, "/models/m")]
    assert [node for node, _ in found] == ["node5", "node4", "node5", "node3"]
    assert "cut off" in found[0][1] and "no tokenizer here" in found[1][1] and "other files" in found[3][1]
    assert all("copy the model directory" in f.remedy for f in model.judge(answers, "/models/m"))


def test_a_tokenizer_larger_than_the_model_is_a_fault_of_the_model_and_of_no_node(whole: Path) -> None:
    write_fast(whole, *(f"<new{index}>" for index in range(8)))
    (finding,) = model.judge(dict.fromkeys(["node1", "node2"], look(whole)), "/models/m")
    assert (finding.node, finding.blames_node) == ("", False) and "vocab_size" in finding.found


def test_the_configuration_reaches_the_nodes_unchanged(make: Make) -> None:
    import json

    changes = {"rollout.urls": ("http://a:1", "http://b:2"), "data.train.task_args": {"sizes": 3}}
    config = make(changes)
    assert layout.from_json(json.loads(json.dumps(layout.to_json(config)))) == config


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, ""),
        ({"parallel.tensor": 3}, "parallel.tensor=3 must divide num_attention_heads=4"),
        ({"data.train.path": "/no/such.jsonl"}, "data.train.path=/no/such.jsonl must be an existing file"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_told(make: Make, changes: dict[str, Any], complaint: str) -> None:
    assert complaint in (told := layout.measure(layout.to_json(make(changes)))) and bool(told) == bool(complaint)


def places(trainer: int, rollout: int = 0) -> Places:
    nodes = tuple(f"node{index}" for index in range(trainer + rollout))
    return Places((), nodes[:trainer], nodes[trainer:] or nodes, job_id="7")


def test_a_layout_that_does_not_spread_over_the_nodes_is_told(make: Make) -> None:
    config = make({"parallel.data": 4})
    assert layout.judge_allocation(config, places(2)) == []
    (finding,) = layout.judge_allocation(config, places(3))
    assert "3 trainer nodes must divide the 4 ranks" in finding.found and not finding.blames_node


def test_nodes_for_servers_that_the_job_lacks_are_told(make: Make) -> None:
    (finding,) = layout.judge_allocation(make({"slurm.rollout_nodes": 2}), places(1, 1))
    assert "slurm.rollout_nodes=2 and the job has 1 nodes" in finding.found


def test_checkpoints_need_the_weights_and_adams_state_once_more_than_are_kept(make: Make) -> None:
    config = make({"model.dtype": "bfloat16", "checkpoint.keep": 2, "weight_sync.disk_path": "/scratch"})
    needed = disk.needed_bytes(config, 1_000_000_000)
    assert needed["checkpoints of run.dir"] == 3 * 14_000_000_000  # 2 bytes and 3 x 4 a parameter
    assert needed["weight_sync.disk_path"] == 2_000_000_000
    every = make({"checkpoint.keep_every": 10, "run.steps": 100, "checkpoint.keep": 1})
    assert disk.needed_bytes(every, 1000)["checkpoints of run.dir"] == 12 * 16_000
    never = make({"checkpoint.interval": 0, "weight_sync.transports": ("broadcast",)})
    assert disk.needed_bytes(never, 10**12)["run.dir"] == disk.LOGS_BYTES


def test_a_full_disk_of_one_node_is_that_nodes_fault_and_what_a_resumed_run_holds_counts(tmp_path: Path) -> None:
    folders = {"run.dir": str(tmp_path)}
    answers = {"node1": {"run.dir": [90, 0]}, "node2": {"run.dir": [40, 70]}, "node3": {"run.dir": [40, 10]}}
    (finding,) = disk.judge(answers, {"run.dir": 80}, folders, parameters=1)
    assert finding.node == "node3" and str(tmp_path) in finding.remedy


def test_free_bytes_and_held_checkpoints_are_measured(tmp_path: Path) -> None:
    (tmp_path / "step-000020").mkdir()
    (tmp_path / "step-000020" / "weights").write_bytes(b"x" * 1000)
    free, held = disk.measure({"a": str(tmp_path)})["a"]
    assert held == 1000 and free > 0
    assert disk.measure({"a": str(tmp_path / "not" / "yet")})["a"][1] == 0


def test_memory_is_compared_with_the_smallest_gpu_or_with_the_node_on_cpu() -> None:
    answer = {"peak_bytes": 30 * 2**30, "needed_bytes": 33 * 2**30, "offloaded_bytes": 0, "host_bytes": 64 * 2**30}
    assert memory.judge(answer, 40 * 2**30, 8).status == "ok"
    assert memory.judge(answer, 32 * 2**30, 1).status == "fail"
    assert memory.judge(answer, 0, 2).status == "ok"
    too_many = memory.judge(answer, 0, 3)
    assert too_many.status == "fail" and "rpp plan" in too_many.remedy and "90 GiB" in too_many.found


def test_what_is_offloaded_must_fit_the_nodes_host_memory() -> None:
    sizes = {"peak_bytes": 30, "needed_bytes": 33, "offloaded_bytes": 9, "host_bytes": 64}
    answer = {name: size * 2**30 for name, size in sizes.items()}
    assert memory.judge(answer, 40 * 2**30, 7).status == "ok"
    eighth = memory.judge(answer, 40 * 2**30, 8)
    assert eighth.status == "fail" and "memory.offload takes 72 GiB of host memory on a node" in eighth.found
    assert memory.judge(answer, 0, 1).status == "ok"
    assert memory.judge(answer, 0, 2).status == "fail", "on CPU both are in the node's memory"
