"""FP8 scales of recipe `delayed`, which come from the passes before: a model that has run none yet has none."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_rpp.model.build import Model
from megatron_rpp.model.fp8 import shares_scales


def settle_scales(model: Model, run: Callable[[Model], object]) -> None:
    """Where the scales of `model` are still 1, `run` a forward pass over it and set them by what it met.

    Nothing with other recipes. Transformer Engine updates scales behind passes with gradients only, and models are
    scored before there is one: with scales of 1 most weights would round to a few values. A collective over the
    stage's TP x CP x DP ranks, which all have run the same passes.
    """
    if not shares_scales(model.config) or _has_history(model):
        return
    run(model)
    # Of all models of this process; what has met nothing since its last update keeps its scale.
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=True)


def _has_history(model: Model) -> bool:
    """Whether any of this rank's layers has met a value in a pass that its scales know of."""
    return any(_history(module).any() for chunk in model.chunks for module in chunk.modules())


def _history(module: torch.nn.Module) -> torch.Tensor:
    """[amax_history, tensors] of the forward, empty before the first pass and in layers without FP8."""
    state = getattr(module, "fp8_meta", {}).get("scaling_fwd")
    history = getattr(state, "amax_history", None)
    return history if isinstance(history, torch.Tensor) else torch.empty(0)
