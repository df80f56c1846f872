"""Loading Megatron's optimizer where it is torch's AdamW (without Transformer Engine and apex).

torch keeps a step tensor for each parameter, which the fused optimizers do not, and Megatron's
DistributedOptimizer trips over it: before the first step it finds none, while it loads the moments it
looks for a saved one, and afterwards all parameters share one, which AdamW advances once a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter of a fresh AdamW its zero state; other optimizers are left alone."""
    for adam in _torch_adams(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def load_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """`optimizer.load_state_dict(loaded)`, step counts included."""
    adams = list(_torch_adams(optimizer))
    moments = loaded.pop("param_state", None) if adams else None
    optimizer.load_state_dict(loaded)
    steps = [(state, state.pop("step").clone()) for adam in adams for state in adam.state.values()]
    if moments is not None:
        (part,) = optimizer.chained_optimizers
        part.load_parameter_state_from_fully_reshardable(moments)
    for state, step in steps:
        state["step"] = step


def _torch_adams(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.Adam):  # AdamW is an Adam
            yield part.optimizer
