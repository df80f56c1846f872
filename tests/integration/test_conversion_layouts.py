"""A converted Megatron directory is the source model on every layout, and a run's checkpoint converts back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint_tools import hf_to_megatron, megatron_to_hf
from megatron_rpp.checkpoint.folders import latest_checkpoint
from megatron_rpp.conversion.difference import differences
from megatron_rpp.conversion.sources import HFSource
from tests.distributed.layouts import EXPERT_LAYOUTS, LAYOUTS, layouts_of, run_on
from tests.support.tiny_models import FAMILY_NAMES, save_tiny

ON = ("tp2", "pp2", "tp2_pp2", "pp2_vpp2", "dp2_ep2", "tp2_sp_ep2")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FAMILY and FAMILY-megatron of every family; matrices cut in two."""
    root = tmp_path_factory.mktemp("converted")
    for family in FAMILY_NAMES:
        source = save_tiny(family, root)
        assert hf_to_megatron.main(["--hf", str(source), "--out", f"{source}-megatron", "--tp", "2"]) == 0
    return root


@pytest.mark.parametrize("layout", ON)
def test_converted_directory_is_the_source_model_on_the_layout(converted: Path, tmp_path: Path, layout: str) -> None:
    fitting = [family for family in FAMILY_NAMES if layout in layouts_of(family)]
    models = {family: str(converted / f"{family}-megatron") for family in fitting}
    parallel = {**LAYOUTS, **EXPERT_LAYOUTS}[layout]
    run_on(parallel, "conversion_worker", {"models": models, "out": str(tmp_path), "vocab_divisor": 16}, tmp_path)
    for family in fitting:
        source = HFSource(converted / family)
        missing = set(source.tensors)
        for file in tmp_path.glob(f"{family}-[0-9].pt"):
            exported = torch.load(file)
            padding = exported.pop("padding", torch.zeros(1))
            assert not padding.any(), f"{family}: rows of vocabulary padding are not zero"
            for name, tensor in exported.items():
                assert torch.equal(tensor, source.read(name)), f"{family}: {name} at {layout}"
            missing -= set(exported)
        assert not missing, f"{family} at {layout} lacks {missing}"


@pytest.mark.parametrize("layout", ["tp2_pp2", "dp2_distributed_optimizer"])
def test_checkpoint_of_a_run_converts_to_its_weights_without_the_optimizer(tmp_path: Path, layout: str) -> None:
    source = save_tiny("llama", tmp_path)
    run_dir, out = tmp_path / "run", tmp_path / "out"
    arguments = {"models": {"llama": str(source)}, "run_dir": str(run_dir), "vocab_divisor": 16}
    run_on(LAYOUTS[layout], "conversion_worker", arguments, tmp_path)
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    convert = ["--megatron", str(checkpoint), "--out"]
    assert megatron_to_hf.main([*convert, str(out)]) == 0
    assert not list(differences(HFSource(source), HFSource(out), atol=None))
    (checkpoint / "config.json").unlink()  # as in checkpoints that other programs write
    assert megatron_to_hf.main([*convert, str(tmp_path / "other")]) == 2
    assert megatron_to_hf.main([*convert, str(tmp_path / "other"), "--hf", str(source)]) == 0
    assert not list(differences(HFSource(source), HFSource(tmp_path / "other"), atol=None))
