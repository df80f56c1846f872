"""The crown: one fixed batch gives the same advantages, loss and gradients on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.layouts import LAYOUTS, run_on
from tests.support.tiny_models import save_tiny

FAMILIES = ("llama", "qwen2", "qwen3")
Result = dict[str, Any]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Result]]:
    """Layout -> family -> result; one job a layout runs every family."""
    root = tmp_path_factory.mktemp("invariance")
    models = {family: str(save_tiny(family, root / "models")) for family in FAMILIES}
    found: dict[str, dict[str, Result]] = {}
    for name, layout in LAYOUTS.items():
        out = root / name
        out.mkdir()
        run_on(layout, "invariance_worker", {"models": models, "out": str(out)}, out)
        found[name] = {family: _merge(out, family) for family in FAMILIES}
    return found


def _merge(out: Path, family: str) -> Result:
    replicas = [torch.load(p) for p in sorted(out.glob(f"{family}-replica*.pt"))]
    gradients: dict[str, Tensor] = {}
    for path in sorted(out.glob(f"{family}-stage*.pt")):
        stage = torch.load(path)
        assert not gradients.keys() & stage.keys(), "two stages export the same tensor"
        gradients |= stage
    row_names = ("advantages", "policy_logprobs", "ref_logprobs")
    rows = {k: torch.stack([r[k] for r in replicas], 1).flatten(0, 1) for k in row_names}
    return {"loss": replicas[0]["loss"], "clipped": replicas[0]["clipped"], "gradients": gradients, **rows}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp1_pp1_dp1"])
def test_layout_does_not_change_logprobs_advantages_loss_or_gradients(
    results: dict[str, dict[str, Result]], layout: str, family: str
) -> None:
    expected, found = results["tp1_pp1_dp1"][family], results[layout][family]
    for name in ("policy_logprobs", "ref_logprobs"):
        assert (found[name] - expected[name]).abs().max() < 1e-5, name
    assert (found["advantages"] - expected["advantages"]).abs().max() < 1e-10
    assert abs(found["loss"] / expected["loss"] - 1) < 1e-6
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        error = (found["gradients"][name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"{name}: gradient differs by {error:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_baseline_case_clips_and_reaches_every_parameter(results: dict[str, dict[str, Result]], family: str) -> None:
    assert results["tp1_pp1_dp1"][family]["clipped"] > 0
    for name, gradient in results["tp1_pp1_dp1"][family]["gradients"].items():
        assert gradient.norm() > 0, f"{name} gets no gradient, so the comparison would prove nothing"
