"""FP8 scales of recipe `delayed`, which come from the passes before: a model that has run none yet has none."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from megatron_rpp.model.build import Model
from megatron_rpp.model.fp8 import shares_scales
from megatron_rpp.parallel.collectives import Gather, gather_objects

_MOST_PASSES = 4
"""A product's gradient in E5M2 is 0 until the product behind it has a scale, and the residual stream is in bfloat16:
no layer has more than three products in a row (those of latent attention)."""


def settle_scales(model: Model, run: Callable[[Model], object]) -> None:
    """Where the scales of `model` are still 1, `run` a forward pass over it and set them by what it met.

    Nothing with other recipes. Transformer Engine updates scales behind passes with gradients only, and models are
    scored before there is one: with scales of 1 most weights would round to a few values. A collective over the
    stage's TP x CP x DP ranks, which all have run the same passes.
    """
    if not shares_scales(model.config) or _count_met(model, "scaling_fwd"):
        return
    run(model)
    # Of all models of this process; what has met nothing since its last update keeps its scale.
    _global_state().reduce_and_update_fp8_tensors(forward=True)


def settle_gradient_scales(model: Model, run: Callable[[], object], gather: Gather = gather_objects) -> None:
    """Where the gradients' scales of `model` are still 1, `run` forward and backward until no more of them are set.

    Nothing with other recipes. Gradients are about as small as one over the tokens of a step: with scales of 1 most
    are 0 in E5M2. Transformer Engine updates the scales, those of the forward as well, behind each microbatch; what
    `run` leaves in the gradients' buffers is the caller's to zero. A collective over the whole job.
    """
    if not shares_scales(model.config):
        return
    met = _of_job(model, gather)
    if met:  # in a step before, or in the run that is resumed
        return
    for _ in range(_MOST_PASSES):
        run()
        before, met = met, _of_job(model, gather)
        if met == before:
            return


def _of_job(model: Model, gather: Gather) -> int:
    """How many gradients have a scale, on all ranks together: a stage must not run what the others do not."""
    return sum(gather(_count_met(model, "scaling_bwd")))


def _count_met(model: Model, direction: str) -> int:
    """How many tensors of this rank's layers have met a value in a pass that their scales know of."""
    states = [_state(module, direction) for chunk in model.chunks for module in chunk.modules()]
    return sum(int(_has_met(state).sum()) for state in states if state is not None)


def _state(module: torch.nn.Module, direction: str) -> Any:
    """Scale and history of a layer's tensors; None before the first pass and in layers without FP8."""
    state = getattr(module, "fp8_meta", {}).get(direction)
    return state if isinstance(getattr(state, "amax_history", None), torch.Tensor) else None


def _has_met(state: Any) -> torch.Tensor:
    """[tensors] bool. A history of one pass is empty again behind each update."""
    met: torch.Tensor = (state.amax_history != 0).any(dim=0) | (state.scale != 1)
    return met


def _global_state() -> Any:
    """Transformer Engine's FP8GlobalStateManager, which older releases have in a module that newer ones give up."""
    try:
        module = importlib.import_module("transformer_engine.pytorch.quantization")
    except ModuleNotFoundError:
        module = importlib.import_module("transformer_engine.pytorch.fp8")
    return module.FP8GlobalStateManager
