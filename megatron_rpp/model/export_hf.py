"""A model's shards back to Hugging Face tensors, an iterator: for weight sync, and for directories (save_hf.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rpp.model.build import Model
from megatron_rpp.model.fp8_params import plain
from megatron_rpp.model.hf_io.safetensors_writer import Entry
from megatron_rpp.model.hf_mapping import family_of
from megatron_rpp.model.shards import ShardedParameter, sharded_parameters
from megatron_rpp.parallel.collectives import gather_shards


def hf_tensors(
    model: Model,
    value_of: Callable[[ShardedParameter], Tensor | None] = lambda item: plain(item.parameter),
    gather: Callable[[Tensor, ProcessGroup], list[Tensor]] = gather_shards,
) -> Iterator[tuple[str, Tensor]]:
    """This pipeline stage's tensors under their Hugging Face names, whole.

    A collective over the TP group, and over the groups of experts where these are split: every rank that
    `takes_part_in_export` must run the iterator to its end, and each gets every tensor. Experts come one of
    each EP rank at a time. `value_of` picks what is exported of a parameter (its gradient, say), shaped like
    it; None leaves it out, on every rank. `gather` gives the equally shaped shards of a group's ranks.
    """
    family = family_of(model.hf)
    for item in sharded_parameters(model.chunks):
        local = None if item.is_tied_copy else value_of(item)  # the first stage exports a tied embedding
        if local is None:
            continue
        rule, names = family.find(item.name)
        group = model.parallel.etp_group if item.is_expert else model.parallel.tp_group
        whole = rule.transform.merge([local] if item.dim is None else gather(local, group), item.dim, model.hf)
        if not item.is_expert:
            yield from zip(names, whole, strict=True)
        else:
            parts = [gather(part, model.parallel.ep_group) for part in whole]
            for name, tensors in zip(item.ep_names, zip(*parts, strict=True), strict=True):
                yield from zip(family.find(name)[1], tensors, strict=True)
            del parts, tensors
        del whole  # before the next parameter is gathered


def empty_hf_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """What `hf_tensors` will give, on the meta device; no collective."""

    def alike(shard: Tensor, group: ProcessGroup) -> list[Tensor]:
        return [shard] * group.size()

    def empty(item: ShardedParameter) -> Tensor:  # not of the parameter's own class, which may be FP8
        return torch.empty(item.parameter.shape, dtype=item.parameter.dtype, device="meta")

    return hf_tensors(model, empty, alike)


def entries_of(tensors: Iterator[tuple[str, Tensor]]) -> list[Entry]:
    """Name, dtype and shape of each."""
    return [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]


def takes_part_in_export(model: Model) -> bool:
    """Whether this rank must run `hf_tensors` for the first replica's first ranks to get its tensors.

    The groups of experts reach across replicas and context-parallel ranks; without any, those of one are enough.
    """
    parallel = model.parallel
    is_first_copy = parallel.dp_rank == 0 and parallel.cp_rank == 0
    return is_first_copy or (model.hf.moe is not None and parallel.ep_size * parallel.etp_size > 1)
