"""A checkpoint continues the run that wrote it, at the same layout and at another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed.layouts import LAYOUTS, run_on
from tests.support.tiny_models import save_tiny

SAVED_ON = ("dp2_distributed_optimizer", "tp2_pp2", "pp2_vpp2")


def _run(root: Path, layout: str, action: str, run_dir: Path) -> dict[str, Tensor]:
    out = root / f"{action}-{layout}"
    out.mkdir()
    arguments = {"model": str(root / "llama"), "action": action, "run_dir": str(run_dir), "out": str(out)}
    run_on(LAYOUTS[layout], "checkpoint_worker", arguments, out)
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
