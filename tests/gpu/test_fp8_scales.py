"""Recipe delayed has scales before they are used: with scales of 1 two models agree on being wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_rpp.config.schema import Config
from megatron_rpp.engine.advantages import ShapingState, add_advantages
from megatron_rpp.engine.optimizer import make_trainable
from megatron_rpp.engine.score import score
from megatron_rpp.engine.train_step import train_step
from megatron_rpp.model.build import Model, build_frozen, build_model
from tests.gpu.recipes import recipes_here
from tests.gpu.site import Site, with_fp8

INPUTS = {"scaling_fwd": 2, "scaling_bwd": 1}
"""Tensors of a product that are quantized, first in the list of its scales: input and weight; output's gradient."""


def scales_of_one(model: Model, key: str) -> list[str]:
    """Layers with a product in FP8 any of whose operands has the scale that it was made with."""
    layers = {name: module for chunk in model.chunks for name, module in chunk.named_modules() if _is_product(module)}
    assert layers, "no layer computes in FP8"
    return [name for name, module in layers.items() if (_scales(module, key) == 1).any()]


def _is_product(module: torch.nn.Module) -> bool:
    return hasattr(module, "weight") and "scaling_fwd" in getattr(module, "fp8_meta", {})


def _scales(module: Any, key: str) -> torch.Tensor:
    """One of a layer that has met no gradient yet is 1, too."""
    state = module.fp8_meta.get(key)
    return torch.ones(1) if state is None else state.scale[: INPUTS[key]]


def test_scoring_sets_the_scales_of_policy_and_reference(site: Site) -> None:
    if "delayed" not in recipes_here():
        pytest.skip("this GPU has no delayed")
    config = with_fp8(site.config(site.llama()), "delayed")
    policy, reference = (build(config, site.parallel, path=config.model.path) for build in (build_model, build_frozen))
    score(site.batch(), policy, reference, config)
    assert not scales_of_one(policy, "scaling_fwd") and not scales_of_one(reference, "scaling_fwd")


def first_step(site: Site, config: Config) -> tuple[Model, float]:
    """(policy, gradient norm)."""
    policy, optimizer = make_trainable(
        build_model(config, site.parallel, path=config.model.path), config.optimizer, total_steps=10
    )
    batch = score(site.batch(), policy, None, config)
    batch, _, _ = add_advantages(batch, config, site.parallel, ShapingState())
    return policy, train_step(policy, optimizer, batch, config)["grad_norm"]


def first_gradient_is_that_of_bfloat16(site: Site, recipe: str) -> Model:
    """Gradients are divided by the tokens of a batch: with a scale of 1 most would be 0 in E5M2."""
    plain = site.config(site.llama())
    plain = replace(plain, algorithm=replace(plain.algorithm, kl_coef=0.0))
    _, expected = first_step(site, plain)
    policy, norm = first_step(site, with_fp8(plain, recipe))
    assert abs(norm / expected - 1) < 0.1, f"gradient norm {norm:.3e}, in bfloat16 {expected:.3e}"
    return policy


def test_the_first_step_has_scales_for_its_gradients(site: Site) -> None:
    if "delayed" not in recipes_here():
        pytest.skip("this GPU has no delayed")
    policy = first_gradient_is_that_of_bfloat16(site, "delayed")
    assert not scales_of_one(policy, "scaling_fwd") and not scales_of_one(policy, "scaling_bwd")
