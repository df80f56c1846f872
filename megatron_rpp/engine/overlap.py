"""Sums of gradients beside the backward, and gathers of updated weights beside the next forward.

Wired as Megatron's own training script does it. Whoever reads weights outside of a training step's forward must find
them whole: `finish_param_gather` stands behind the last optimizer step of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rpp.model.build import Model


def overlap_gradient_sums(config: TransformerConfig, chunks: Sequence[DistributedDataParallel]) -> None:
    """Have the schedules sum gradients in the last microbatch's backward alone.

    Without `no_sync` each microbatch would start the sum. With several stages the later ones wait, so that all sum at
    the same time and the first, whose backward ends last, is not slowed down (`align_grad_reduce`).
    """
    config.no_sync_func = _one_or_all([chunk.no_sync for chunk in chunks])
    if config.pipeline_model_parallel_size > 1:
        config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in chunks])


def _one_or_all(functions: list[Any]) -> Any:
    """Schedules want a list of interleaved chunks only."""
    return functions if len(functions) > 1 else functions[0]


def finish_param_gather(model: Model) -> None:
    """Wait for all updated weights of a model. A collective over its data-parallel ranks; does nothing
    where weights are gathered at once, or have been since the last update.

    `start_param_sync(force_sync=True)` would leave out what FP8 parameters want done behind a gather.
    """
    for chunk in model.chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.use_forward_hook:
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                group.finish_param_sync(skip_next_bucket_dispatch=True)
