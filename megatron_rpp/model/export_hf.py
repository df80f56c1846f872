"""A model's shards back to Hugging Face tensors, an iterator: for weight sync, and for directories (save_hf.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rpp.model.build import Model
from megatron_rpp.model.fp8_params import plain
from megatron_rpp.model.hf_io.safetensors_writer import Entry
from megatron_rpp.model.hf_mapping import family_of
from megatron_rpp.model.shards import ShardedParameter, sharded_parameters
from megatron_rpp.parallel.collectives import GatherShards, gather_shards


def hf_tensors(
    model: Model,
    value_of: Callable[[ShardedParameter], Tensor | None] = lambda item: plain(item.parameter),
    gather: GatherShards = gather_shards,
) -> Iterator[tuple[str, Tensor]]:
    """This pipeline stage's tensors under their Hugging Face names, whole.

    A collective over the TP group, and over the groups of experts where these are split: every rank that
    `takes_part_in_export` must run the iterator to its end, and each gets every tensor. A layer's experts come in the
    order of their numbers, as a server holds them: who hashes its parameters keeps nothing. `value_of` picks what is
    exported of a parameter (its gradient, say), shaped like it; None leaves it out, on every rank; it is asked again
    for each EP rank.
    """
    family = family_of(model.hf)
    for item, ep_rank in _in_turn(sharded_parameters(model.chunks)):
        local = None if item.is_tied_copy else value_of(item)  # the first stage exports a tied embedding
        if local is None:
            continue
        group = model.parallel.tp_group
        if ep_rank is not None:
            group = model.parallel.etp_group
            (local,) = gather(local, model.parallel.ep_group, [ep_rank])
        rule, names = family.find(item.name if ep_rank is None else item.ep_names[ep_rank])
        shards = [local] if item.dim is None else gather(local, group)
        del local
        whole = rule.transform.merge(shards, item.dim, model.hf)
        del shards
        yield from zip(names, whole, strict=True)
        del whole  # each may be a copy: none is left when the next parameter is gathered


def _in_turn(items: Iterable[ShardedParameter]) -> Iterator[tuple[ShardedParameter, int | None]]:
    """Each with None, but a layer's experts with every EP rank, one rank after the other."""
    for is_expert, run in groupby(items, lambda item: item.is_expert):
        if is_expert:  # all of a layer: between two layers are other parameters
            experts = list(run)
            yield from ((item, rank) for rank in range(len(experts[0].ep_names)) for item in experts)
        else:
            yield from ((item, None) for item in run)


def empty_hf_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """What `hf_tensors` will give, on the meta device; no collective."""

    def alike(shard: Tensor, group: ProcessGroup, ranks: Sequence[int] | None = None) -> list[Tensor]:
        return [shard] * (group.size() if ranks is None else len(ranks))

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
