"""Multi-token prediction layers beside training: a policy is loaded, used and saved, and they come out as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rpp.model.hf_io.tensors import HFTensors
from tests.distributed.layouts import EXPERT_LAYOUTS, LAYOUTS, run_on
from tests.support.mtp import add_mtp
from tests.support.tiny_models import save_tiny

FAMILIES = ("deepseek_v3", "glm4_moe")


@pytest.mark.parametrize("layout", ["pp2_vpp2", "tp2_sp_ep2"])
def test_mtp_layers_are_saved_with_a_policy_that_does_not_hold_them(layout: str, tmp_path: Path) -> None:
    """Embedding and output weights may be on two stages, each of which has a copy to write."""
    models = {family: save_tiny(family, tmp_path) for family in FAMILIES}
    for path in models.values():
        add_mtp(path)
    arguments = {"padded": {family: str(path) for family, path in models.items()}, "packed": {}, "out": str(tmp_path)}
    out = tmp_path / "padded"
    out.mkdir()
    run_on({**LAYOUTS, **EXPERT_LAYOUTS}[layout], "invariance_worker", arguments, tmp_path)
    for family, path in models.items():
        saved, stored = HFTensors(str(out / f"{family}-saved")), load_file(path / "model.safetensors")
        assert set(saved.names) == stored.keys()
        assert all(torch.equal(saved.read(name), tensor) for name, tensor in stored.items())
        config = json.loads((out / f"{family}-saved" / "config.json").read_text())
        assert config["num_nextn_predict_layers"] == 1
