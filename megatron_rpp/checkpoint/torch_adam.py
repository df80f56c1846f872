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

from megatron_rpp.engine.optimizer import chained_parts

_NO_PARAMETER = "no parameter"  # a key in the state of an AdamW; torch keeps such entries and passes them over


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


def give_steps(optimizer: MegatronOptimizer) -> None:
    """Give an AdamW without parameters the step of the others: Megatron saves each one's step.

    A pipeline stage without experts has one for experts all the same, and the first stage's is what is saved.
    """
    adams = list(_torch_adams(optimizer))
    steps = [state["step"] for adam in adams for state in adam.state.values()]
    for adam in adams:
        if not any(group["params"] for group in adam.param_groups):
            adam.state[_NO_PARAMETER] = {"step": steps[0].clone()}  # type: ignore[index]


def load_state(optimizer: MegatronOptimizer, loaded: dict[Any, Any]) -> None:
    """`optimizer.load_state_dict(loaded)`, step counts included."""
    adams = list(_torch_adams(optimizer))
    parts = chained_parts(optimizer)
    states = [loaded] if len(parts) == 1 else [loaded[i] for i in range(len(parts))]
    moments = [state.pop("param_state", None) if adams else None for state in states]
    optimizer.load_state_dict(loaded)
    steps = [(state, state.pop("step").clone()) for adam in adams for state in adam.state.values()]
    for part, moment in zip(parts, moments, strict=True):
        if moment is not None:
            part.load_parameter_state_from_fully_reshardable(moment)
    for state, step in steps:
        state["step"] = step


def _torch_adams(optimizer: MegatronOptimizer) -> Iterator[torch.optim.Optimizer]:
    for part in chained_parts(optimizer):
        if isinstance(part.optimizer, torch.optim.Adam):  # AdamW is an Adam
            yield part.optimizer
