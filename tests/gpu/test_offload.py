"""What memory.offload moves to the host leaves the GPU, and training goes on bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_rpp.config.performance import MemoryConfig
from megatron_rpp.device.memory import MemoryUse, memory_use
from megatron_rpp.engine.advantages import ShapingState, add_advantages
from megatron_rpp.engine.offload import Offload
from megatron_rpp.engine.optimizer import make_trainable
from megatron_rpp.engine.score import score
from megatron_rpp.engine.train_step import train_step
from megatron_rpp.model.build import build_frozen, build_model
from megatron_rpp.model.export_hf import hf_tensors
from tests.gpu.site import Site, free

EVERYTHING = ("optimizer", "gradients", "reference")


def two_steps(site: Site, parts: tuple[str, ...]) -> tuple[dict[str, Tensor], list[float]]:
    """(weights after two steps, gradient norms), with `parts` put away between phases."""
    config = replace(site.config(site.llama()), memory=MemoryConfig(offload=parts))
    reference = build_frozen(config, site.parallel, path=config.model.path)
    built = build_model(config, site.parallel, path=config.model.path)
    policy, optimizer = make_trainable(built, config.optimizer, 10)
    offload, norms = Offload(config.memory, policy, optimizer, reference), []
    held = memory_use()
    offload.put_away()
    if parts:
        assert_freed(held, offload.host_bytes)
    for _ in range(2):
        with offload.scoring():
            batch = score(site.batch(), policy, reference, config)
        batch, _, _ = add_advantages(batch, config, site.parallel, ShapingState())
        with offload.training():
            norms.append(train_step(policy, optimizer, batch, config)["grad_norm"])
    return {name: tensor.clone() for name, tensor in hf_tensors(policy)}, norms


def assert_freed(before: MemoryUse | None, host_bytes: int) -> None:
    """On a GPU: what is on the host now is no longer there."""
    after = memory_use()
    if before is not None and after is not None:
        assert before.held - after.held >= host_bytes > 0, "moved, but still on the GPU"


def offload_changes_nothing(site: Site) -> None:
    plain = two_steps(site, ())
    free()
    moved = two_steps(site, EVERYTHING)
    assert moved[1] == plain[1]
    assert all(torch.equal(tensor, moved[0][name]) for name, tensor in plain[0].items())


@pytest.mark.usefixtures("one_order")
def test_offloaded_training_is_training(site: Site) -> None:
    offload_changes_nothing(site)
