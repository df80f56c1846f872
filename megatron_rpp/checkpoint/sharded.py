"""Model and optimizer as Megatron's sharded state dicts, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8

from megatron_rpp.checkpoint.fp8_state import (
    cast_again,
    load_reference_scales,
    own_pickles,
    reference_scales,
    without_absent_scales,
)
from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.checkpoint.torch_adam import allocate_state, give_steps, load_state
from megatron_rpp.engine.optimizer import Optimizer
from megatron_rpp.model.build import Model

# The default sharding of the distributed optimizer cannot be resharded by dist_checkpointing.
# Experts have an optimizer of their own in Megatron; its place in the chain is no part of a tensor's name.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def load_checkpoint(path: Path, policy: Model, optimizer: Optimizer, reference: Model | None = None) -> RunState:
    """Load model, optimizer and schedule in place; the layout may differ from the one that saved.

    reference: gets the FP8 scales that it had, where its recipe has a history.
    """
    allocate_state(optimizer.megatron)
    state_dict = without_absent_scales(sharded_state(policy, optimizer, reference, is_loading=True), path)
    force_all_tensors_to_non_fp8(state_dict)  # from 0.19 on Megatron would else read into views of them
    loaded = dist_checkpointing.load(state_dict, str(path))
    with own_pickles():
        for key, chunk in _chunk_keys(policy):
            chunk.load_state_dict(loaded[key])
        load_reference_scales(reference, loaded)
    load_state(optimizer.megatron, loaded["optimizer"])
    cast_again(policy, optimizer)
    state = RunState.from_json(json.loads((path / "run_state.json").read_text()))
    optimizer.schedule.load_state_dict(state.schedule)
    return state


def sharded_state(
    policy: Model, optimizer: Optimizer, reference: Model | None = None, *, is_loading: bool
) -> dict[str, Any]:
    """What is saved, or loaded into. A collective over the whole job."""
    give_steps(optimizer.megatron)
    state: dict[str, Any] = {key: chunk.sharded_state_dict() for key, chunk in _chunk_keys(policy)}
    state["optimizer"] = optimizer.megatron.sharded_state_dict(state, is_loading=is_loading, metadata=_METADATA)
    return state | reference_scales(reference)


def _chunk_keys(policy: Model) -> list[tuple[str, Any]]:
    """The bare models inside DDP under Megatron's own keys: `model`, or `model0`, ... for virtual stages."""
    models = [chunk.module for chunk in policy.chunks]
    if len(models) == 1:
        return [("model", models[0])]
    return [(f"model{i}", model) for i, model in enumerate(models)]
