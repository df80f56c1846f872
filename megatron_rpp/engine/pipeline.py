"""The sole caller of Megatron's pipeline schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rpp.engine.heads import Head
from megatron_rpp.engine.loss_scale import as_megatron_loss
from megatron_rpp.experience.collate import split_microbatches
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import Model
from megatron_rpp.parallel.collectives import max_over, share_tensors


def run_pipeline(
    model: Model, batch: ExperienceBatch, head: Head, *, micro_batch_size: int, forward_only: bool
) -> dict[str, Tensor]:
    """Run `batch` through the model in microbatches and answer on every pipeline stage.

    With `forward_only=False` the gradients are left, fully reduced, in the model's gradient buffers.

    Returns:
        The head's outputs: [b, S] outputs of all microbatches joined to [B, S'] with S' >= S (padding
        columns at the end), scalars summed.
    """
    parallel = model.parallel
    least_rows, least_length = _largest(model, batch)
    microbatches = split_microbatches(
        batch,
        micro_batch_size,
        count_multiple=parallel.pp_size if parallel.vpp_size > 1 else 1,
        length_multiple=parallel.tp_size if model.config.sequence_parallel else 1,
        least_rows=least_rows,
        least_length=least_length,
    )
    iterators = [iter(microbatches) for _ in model.chunks]
    outputs = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, head),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=model.chunks,
        num_microbatches=len(microbatches),
        seq_length=microbatches[0].tokens.shape[1],
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    joined = _join(outputs, len(batch)) if parallel.is_last_stage else None
    return share_tensors(parallel.pp_group, joined, parallel.pp_size - 1, parallel.device)


def _largest(model: Model, batch: ExperienceBatch) -> tuple[int, int]:
    """(rows, length) of the largest batch among replicas whose tokens meet in the same experts.

    Their token dispatchers exchange equally shaped microbatches, and equally many of them.
    """
    parallel = model.parallel
    shape = torch.tensor([len(batch), batch.tokens.shape[1]], device=parallel.device)
    if model.hf.moe is not None and parallel.ep_size * parallel.etp_size > 1:
        shape = max_over(parallel.dp_group)(shape)
    rows, length = shape.tolist()
    return rows, length


def _forward_step(
    head: Head, microbatches: Iterator[ExperienceBatch], chunk: torch.nn.Module
) -> tuple[Tensor, partial[tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    micro = next(microbatches)
    positions = torch.arange(micro.tokens.shape[1], device=micro.tokens.device).expand_as(micro.tokens)
    output = chunk(micro.tokens, positions, attention_mask=None)
    # Megatron calls the second value on the last stage only, with the logits [b, S, V / tp_size].
    return output, partial(_loss, head, micro)


def _loss(head: Head, micro: ExperienceBatch, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss, outputs = head(logits, micro)
    return as_megatron_loss(loss, {name: value.detach() for name, value in outputs.items()})


def _join(outputs: Sequence[dict[str, Tensor]], rows: int) -> dict[str, Tensor]:
    joined = {}
    for name in outputs[0]:
        values = [o[name] for o in outputs]
        joined[name] = torch.stack(values).sum() if values[0].dim() == 0 else torch.cat(values)[:rows].contiguous()
    return joined
