"""What a run in FP8 has beyond weights and optimizer: scales of recipe `delayed`, and FP8 parameters (fp8.params).

The policy's scales and their history are `_extra_state` entries of its own sharded state dict.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import fp8_utils
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_rpp.engine.optimizer import Optimizer, chained_parts
from megatron_rpp.model.build import Model
from megatron_rpp.model.fp8 import shares_scales
from megatron_rpp.model.fp8_params import is_fp8
from megatron_rpp.model.load_megatron import read_metadata

logger = logging.getLogger(__name__)

_REFERENCE = "reference."
_ALLOW_PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def reference_scales(reference: Model | None) -> dict[str, Any]:
    """A sharded state dict of the reference's scales, where they come from earlier passes; else nothing.

    Started anew they would not be those of a run that was never stopped, and its KL another.
    """
    if reference is None or not shares_scales(reference.config):
        return {}
    found: dict[str, Any] = {}
    for i, chunk in enumerate(reference.chunks):
        state: dict[str, Any] = chunk.sharded_state_dict(prefix=_REFERENCE)  # type: ignore[operator]
        found[f"reference{i}"] = {name: each for name, each in state.items() if isinstance(each, ShardedObject)}
    return found


def without_absent_scales(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """`state` to load into, less the reference's scales where the checkpoint `path` was made without any."""
    names = {name for name in state if name.startswith(_REFERENCE.rstrip("."))}
    if not names or any(key.startswith(_REFERENCE) for key in read_metadata(path).state_dict_metadata):
        return state
    logger.info("%s has no FP8 scales of the reference, which start anew", path)
    return {name: each for name, each in state.items() if name not in names}


def load_reference_scales(reference: Model | None, loaded: dict[str, Any]) -> None:
    """Undo `reference_scales`."""
    for i, chunk in enumerate(reference.chunks if reference is not None else ()):
        found = loaded.get(f"reference{i}", {})
        chunk.load_state_dict({name.removeprefix(_REFERENCE): each for name, each in found.items()}, strict=False)


@contextmanager
def own_pickles() -> Iterator[None]:
    """Inside, Transformer Engine reads scales back. They are pickles, which from 2.20 on it refuses unless told that
    the file is trusted; a checkpoint of the run itself is, and nothing else is loaded so."""
    before = os.environ.get(_ALLOW_PICKLES)
    os.environ[_ALLOW_PICKLES] = "1"
    try:
        yield
    finally:
        del os.environ[_ALLOW_PICKLES]
        if before is not None:
            os.environ[_ALLOW_PICKLES] = before


def cast_again(policy: Model, optimizer: Optimizer) -> None:
    """FP8 parameters from the float32 main weights, as the step before the checkpoint made them. A collective of DP.

    The checkpoint has them in bfloat16, which the scales of recipe tensorwise are too fine for.
    """
    quantized = [each for chunk in policy.chunks for each in chunk.parameters() if is_fp8(each)]
    if not quantized:
        return
    with torch.no_grad():
        for part in chained_parts(optimizer.megatron):
            part._copy_main_params_to_model_params()
        for chunk in policy.chunks:
            chunk.start_param_sync(force_sync=True)  # type: ignore[operator] # of Megatron's DDP
        fp8_utils.post_all_gather_processing(quantized)  # left to the next forward where gathers overlap with it
