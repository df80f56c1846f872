"""The sole caller of Megatron's pipeline schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rpp.config.schema import TrainConfig
from megatron_rpp.engine.heads import Head
from megatron_rpp.engine.loss_scale import as_megatron_loss
from megatron_rpp.engine.microbatches import cut_batch
from megatron_rpp.experience.packing import Microbatch
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import Model
from megatron_rpp.model.layers.packed_attention import slot_params
from megatron_rpp.parallel.collectives import share_tensors


def run_pipeline(
    model: Model, batch: ExperienceBatch, head: Head, *, train: TrainConfig, forward_only: bool
) -> dict[str, Tensor]:
    """Run `batch` through the model in microbatches and answer on every pipeline stage and CP rank.

    `train` says how it is cut. Packed, rows without response tokens are left out, and what belongs to them is 0.
    With `forward_only=False` the gradients are left, fully reduced, in the model's gradient buffers.

    Returns:
        The head's outputs: [b, S] outputs of all microbatches joined to [B, S'] with S' >= S (padding
        columns at the end), scalars summed.
    """
    parallel = model.parallel
    microbatches = cut_batch(model, batch, train)
    iterators = [iter(microbatches) for _ in model.chunks]
    if model.graph_length:
        for chunk in model.chunks:
            # Megatron records graphs in training mode and only then; its first pass must not be one without a backward.
            chunk.train(not forward_only)
    outputs = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, head),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=model.chunks,
        num_microbatches=len(microbatches),
        # Shapes between stages: Megatron divides the length by CP and, with sequence parallelism, by TP.
        seq_length=microbatches[0].positions // microbatches[0].width,
        micro_batch_size=microbatches[0].width,
        forward_only=forward_only,
    )
    joined = _join(outputs, microbatches, len(batch)) if parallel.is_last_stage else None
    return share_tensors(parallel.pp_group, joined, parallel.pp_size - 1, parallel.device)


def _forward_step(
    head: Head, microbatches: Iterator[Microbatch], chunk: torch.nn.Module
) -> tuple[Tensor, partial[tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    micro = next(microbatches)
    positions = torch.arange(micro.tokens.shape[1], device=micro.tokens.device).expand_as(micro.tokens)
    output = chunk(micro.tokens, positions, attention_mask=None, packed_seq_params=_packed_params(micro))
    # Megatron calls the second value on the last stage only, with the logits [b, S, V / tp_size].
    return output, partial(_loss, head, micro)


def _packed_params(micro: Microbatch) -> PackedSeqParams | None:
    return slot_params(micro.cu_seqlens, micro.bounds) if micro.cu_seqlens is not None else None


def _loss(head: Head, micro: Microbatch, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss, outputs = head(logits, micro)
    return as_megatron_loss(loss, {name: value.detach() for name, value in outputs.items()})


def _join(outputs: Sequence[dict[str, Tensor]], microbatches: Sequence[Microbatch], rows: int) -> dict[str, Tensor]:
    joined = {}
    for name in outputs[0]:
        values = [o[name] for o in outputs]
        if values[0].dim() == 0:
            joined[name] = torch.stack(values).sum()
            continue
        joined[name] = values[0].new_zeros(rows, *values[0].shape[1:])
        for value, micro in zip(values, microbatches, strict=True):
            joined[name][micro.index] = value[: len(micro.index)]
    return joined
