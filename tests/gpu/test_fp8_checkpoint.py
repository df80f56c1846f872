"""A run in FP8 that was saved and loaded goes on bit for bit: weights, scales and amax histories with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pytest
import torch

from megatron_rpp.checkpoint.find import find_checkpoint
from megatron_rpp.checkpoint.manager import Checkpointer
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.sharded import load_checkpoint
from megatron_rpp.config.schema import CheckpointConfig, Config
from megatron_rpp.engine.advantages import ShapingState, add_advantages
from megatron_rpp.engine.optimizer import make_trainable
from megatron_rpp.engine.score import score
from megatron_rpp.engine.train_step import train_step
from megatron_rpp.model.build import build_frozen, build_model
from megatron_rpp.model.export_hf import hf_tensors
from tests.gpu.recipes import recipes_here
from tests.gpu.site import Site, with_fp8

STEPS = 2  # before it is saved
CASES = [  # recipe, and whether the parameters are FP8 too, which check_fp8 has not for delayed and mxfp8
    *(("delayed", False), ("tensorwise", False), ("tensorwise", True)),
    *(("blockwise", False), ("blockwise", True), ("mxfp8", False)),
]


@dataclass
class Run:
    """What a run carries from step to step."""

    config: Config
    site: Site

    def __post_init__(self) -> None:
        path = self.config.model.path
        built = build_model(self.config, self.site.parallel, path=path)
        self.policy, self.optimizer = make_trainable(built, self.config.optimizer, 10)
        self.reference = build_frozen(self.config, self.site.parallel, path=path)

    def step(self) -> dict[str, float]:
        batch = score(self.site.batch(), self.policy, self.reference, self.config)
        batch, _, _ = add_advantages(batch, self.config, self.site.parallel, ShapingState())
        return train_step(self.policy, self.optimizer, batch, self.config)


def a_resumed_run_goes_on(site: Site, recipe: str, **fp8: bool) -> None:
    config, run_dir = with_fp8(site.config(site.llama()), recipe, **fp8), site.folder / "run"
    run = Run(config, site)
    for _ in range(STEPS):
        run.step()
    checkpointer = Checkpointer(run_dir, config.model.path, CheckpointConfig())
    state = RunState(STEPS, {"cursor": 5}, run.optimizer.schedule.state_dict(), asdict(ShapingState()))
    checkpointer.save(run.policy, run.optimizer, state, run.reference, wait=True)
    expected_stats = run.step()
    expected = {name: tensor.clone() for name, tensor in hf_tensors(run.policy)}

    resumed, found = Run(config, site), find_checkpoint(str(run_dir), verify=True)
    assert found is not None
    load_checkpoint(found, resumed.policy, resumed.optimizer, resumed.reference)
    assert resumed.step() == expected_stats
    for name, tensor in hf_tensors(resumed.policy):
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize(("recipe", "params"), CASES)
def test_a_resumed_fp8_run_goes_on_bit_for_bit(site: Site, recipe: str, params: bool) -> None:
    if recipe not in recipes_here():
        pytest.skip(f"this GPU has no {recipe}")
    a_resumed_run_goes_on(site, recipe, params=params)


@pytest.mark.usefixtures("one_order")
def test_a_resumed_bfloat16_run_goes_on_bit_for_bit(site: Site) -> None:
    a_resumed_run_goes_on(site, "none")
