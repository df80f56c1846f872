"""A checkpoint continues the run that wrote it, at the same layout and at another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed.layouts import PACKED_TOKENS, layouts_of, packed_layouts_of, run_on
from tests.support.tiny_models import save_tiny

SAVED_ON = ("dp2_distributed_optimizer", "tp2_pp2", "pp2_vpp2")


def _run(root: Path, layout: str, action: str, run_dir: Path, family: str = "llama") -> dict[str, Tensor]:
    out = root / f"{action}-{layout}"
    out.mkdir()
    split = {**layouts_of(family), **packed_layouts_of(family)}[layout]
    arguments = {"model": str(root / family), "action": action, "run_dir": str(run_dir), "out": str(out)}
    arguments["micro_batch_tokens"] = PACKED_TOKENS if split.context > 1 else 0
    run_on(split, "checkpoint_worker", arguments, out)
    return {k: v for p in out.glob("stage*.pt") for k, v in torch.load(p)["weights"].items()}


@pytest.mark.parametrize("saved_on", SAVED_ON)
def test_resumed_third_step_equals_uninterrupted_one(tmp_path: Path, saved_on: str) -> None:
    save_tiny("llama", tmp_path)
    run_dir = tmp_path / "run"
    uninterrupted = _run(tmp_path, saved_on, "save", run_dir)
    same = _run(tmp_path, saved_on, "load", run_dir)
    for name, weight in uninterrupted.items():
        assert torch.equal(same[name], weight), f"{name}: optimizer state or weight lost at {saved_on}"
    other = _run(tmp_path, "pp2", "load", run_dir)
    for name, weight in uninterrupted.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=2e-6, msg=f"{name}: {saved_on} -> pp2")


@pytest.mark.parametrize(
    ("family", "saved_on", "others"),
    [("llama", "cp2", ("cp2", "tp2")), ("glm4", "tp2", ("tp2_cp2",)), ("qwen3_moe", "tp2_sp_cp2", ("dp2_ep2",))],
)
def test_a_run_continues_at_another_context_parallel_size(
    tmp_path: Path, family: str, saved_on: str, others: tuple[str, ...]
) -> None:
    """CP ranks share the optimizer's state out, and hold the same weights, which one of them saves."""
    save_tiny(family, tmp_path)
    uninterrupted = _run(tmp_path, saved_on, "save", tmp_path / "run", family)
    for layout in others:
        found = _run(tmp_path, layout, "load", tmp_path / "run", family)
        assert found.keys() == uninterrupted.keys()
        for name, weight in uninterrupted.items():
            atol = 0.0 if layout == saved_on else 2e-6
            torch.testing.assert_close(found[name], weight, rtol=0, atol=atol, msg=f"{name}: {saved_on} -> {layout}")


@pytest.mark.parametrize("family", ["gemma3", "glm4"])
def test_norms_behind_attention_and_mlp_continue_at_another_tensor_parallel_size(tmp_path: Path, family: str) -> None:
    """They are modules of our own in Megatron's layers, and must be saved whole by one rank, not as shards."""
    save_tiny(family, tmp_path)
    run_dir = tmp_path / "run"
    uninterrupted = _run(tmp_path, "tp2_sp", "save", run_dir, family)
    other = _run(tmp_path, "pp2_vpp2", "load", run_dir, family)
    assert other.keys() == uninterrupted.keys()
    for name, weight in uninterrupted.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=2e-6, msg=f"{name}: tp2_sp -> pp2_vpp2")


def test_experts_and_their_optimizer_continue_at_the_same_and_at_another_expert_parallel_size(tmp_path: Path) -> None:
    """The first stage has no experts, and what it saves of their optimizer must serve the other ranks."""
    save_tiny("qwen3_moe", tmp_path)
    run_dir = tmp_path / "run"
    uninterrupted = _run(tmp_path, "pp2", "save", run_dir, "qwen3_moe")
    same = _run(tmp_path, "pp2", "load", run_dir, "qwen3_moe")
    other = _run(tmp_path, "tp2_sp_ep2", "load", run_dir, "qwen3_moe")
    assert other.keys() == uninterrupted.keys()
    for name, weight in uninterrupted.items():
        assert torch.equal(same[name], weight), name
        torch.testing.assert_close(other[name], weight, rtol=0, atol=2e-6, msg=f"{name}: pp2 -> tp2_sp_ep2")
    # Adam's updates do not depend on the gradient's scale, so a norm that counts experts twice has to be seen itself.
    runs = ("save-pp2", "load-tp2_sp_ep2")
    norms = [torch.load(tmp_path / run / "stage0.pt")["stats"]["grad_norm"] for run in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
