"""Random-number generators of one rank: torch on host and device, numpy, Python and Megatron's tracker."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import (
    convert_cuda_rng_state,
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)

from megatron_rpp import device

logger = logging.getLogger(__name__)


def rng_file(rank: int) -> str:
    """Name of a rank's file in a checkpoint."""
    return f"rng-{rank:05d}.pt"


def save_rng(path: Path, state: dict[str, Any]) -> None:
    """Write what `rng_state` gave."""
    torch.save(state, path)


def rng_state() -> dict[str, Any]:
    """Every generator's state, of plain types and tensors, so that a file of it can be read without running code."""
    kind, keys, position, has_gauss, gauss = cast(tuple[str, Any, int, int, float], np.random.get_state())
    version, numbers, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "device": device.rng_state(),
        "numpy": [kind, torch.tensor(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(numbers), gauss_next],
        # Of CUDA graphs they are generators, not tensors.
        "megatron": {
            n: convert_cuda_rng_state(state).clone() for n, state in get_cuda_rng_tracker().get_states().items()
        },
    }


def restore_rng(checkpoint: Path, *, is_same_layout: bool, seed: int, step: int) -> None:
    """Put this rank's generators back as `checkpoint` has them; seed them anew where its layout was another."""
    path = checkpoint / rng_file(dist.get_rank())
    if is_same_layout and path.is_file():
        load_rng(path)
        return
    if dist.get_rank() == 0:
        why = "was written at another layout" if path.is_file() else "has none"
        logger.info("random-number generators are seeded anew: %s %s", checkpoint, why)
    seed_anew(seed, step)


def load_rng(path: Path) -> None:
    """Put back what `save_rng` wrote. Raises OSError where the file is not there."""
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state["torch"])
    device.set_rng_state(state["device"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers), gauss_next))
    tracker = get_cuda_rng_tracker()
    of_graphs = tracker.use_cudagraphable_rng
    tracker.set_states({name: convert_cuda_rng_state(x, of_graphs) for name, x in state["megatron"].items()})


def seed_anew(seed: int, step: int) -> None:
    """For a run that goes on at another layout from `step`: other numbers than those of its start."""
    fresh = seed + 1_000_003 * step
    random.seed(fresh)
    np.random.seed(fresh % 2**32)
    torch.manual_seed(fresh)
    of_graphs = get_cuda_rng_tracker().use_cudagraphable_rng
    model_parallel_cuda_manual_seed(fresh, use_cudagraphable_rng=of_graphs, force_reset_rng=True)
