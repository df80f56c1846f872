"""How a replica's batch is cut into microbatches, on its layout."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from megatron_rpp.config.schema import TrainConfig
from megatron_rpp.experience.balance import SequenceCost
from megatron_rpp.experience.collate import split_microbatches
from megatron_rpp.experience.packing import Microbatch, PackingRule, cut, lengths_of, pack, packed_length, padded
from megatron_rpp.experience.types import ExperienceBatch
from megatron_rpp.model.build import Model
from megatron_rpp.model.cost import sequence_cost
from megatron_rpp.model.fp8 import shares_scales, token_multiple_of
from megatron_rpp.parallel.collectives import max_over


def cut_batch(model: Model, batch: ExperienceBatch, train: TrainConfig) -> list[Microbatch]:
    """At least one microbatch, also of a batch without rows.

    A collective over DP where `_runs_in_step`: token dispatchers exchange equally shaped microbatches, and
    equally many of them; and FP8's delayed scales are agreed on behind each.
    """
    assert train.micro_batch_tokens or model.parallel.cp_size == 1, "only packed sequences are shared out over CP ranks"
    return _packed(model, batch, train) if train.micro_batch_tokens else _padded(model, batch, train)


def packing_rule(model: Model, train: TrainConfig) -> PackingRule:
    """How sequences are packed on this rank."""
    parallel = model.parallel
    return PackingRule(
        budget=train.micro_batch_tokens,
        cp_size=parallel.cp_size,
        cp_rank=parallel.cp_rank,
        unit=_sequence_ranks(model) * token_multiple_of(model.config),
    )


def _packed(model: Model, batch: ExperienceBatch, train: TrainConfig) -> list[Microbatch]:
    rule, parallel = packing_rule(model, train), model.parallel
    # Stages that do not tell each other shapes expect one.
    of_one_length = _shares_experts(model) or (parallel.pp_size > 1 and not model.config.variable_seq_lengths)
    lengths = lengths_of(batch.loss_mask).tolist()
    known = _cut(tuple(lengths), rule, sequence_cost(model.hf), _count_multiple(model), of_one_length)
    parts = [list(part) for part in known]
    longest = max(packed_length([lengths[i] for i in part], rule) for part in parts) if of_one_length else 0
    count, longest = _largest(model, [len(parts), longest])
    parts += [[] for _ in range(count - len(parts))]
    return [pack(batch, part, rule, longest) for part in parts]


@lru_cache(maxsize=2)
def _cut(
    lengths: tuple[int, ...], rule: PackingRule, cost: SequenceCost, count_multiple: int, of_one_length: bool
) -> list[list[int]]:
    """As `cut`, once where policy and reference are given the same rows. Nobody may change what it returns."""
    return cut(lengths, rule, cost, count_multiple=count_multiple, of_one_length=of_one_length)


def _padded(model: Model, batch: ExperienceBatch, train: TrainConfig) -> list[Microbatch]:
    size = train.micro_batch_size
    rows, length = _largest(model, list(batch.tokens.shape))
    pieces = split_microbatches(
        batch,
        size,
        count_multiple=_count_multiple(model),
        length_multiple=_length_multiple(model, size),
        least_rows=rows,
        least_length=max(length, model.graph_length),
    )
    index = torch.arange(len(batch), device=batch.tokens.device)
    return [padded(piece, index[i * size : (i + 1) * size]) for i, piece in enumerate(pieces)]


def _count_multiple(model: Model) -> int:
    """An interleaved schedule wants a multiple of the stages."""
    return model.parallel.pp_size if model.parallel.vpp_size > 1 else 1


def _sequence_ranks(model: Model) -> int:
    """The ranks that share out the positions of a microbatch."""
    return model.parallel.tp_size if model.config.sequence_parallel else 1


def _length_multiple(model: Model, rows: int) -> int:
    """Of padded rows, so that sequence parallelism splits them evenly and all rows' tokens on a rank suit FP8."""
    multiple = token_multiple_of(model.config)
    return _sequence_ranks(model) * (multiple // math.gcd(multiple, rows))


def _runs_in_step(model: Model) -> bool:
    """Whether replicas wait for each other in every microbatch."""
    return _shares_experts(model) or shares_scales(model.config)


def _shares_experts(model: Model) -> bool:
    """Whether tokens of several replicas may meet in the same experts."""
    return model.hf.moe is not None and model.parallel.ep_size * model.parallel.etp_size > 1


def _largest(model: Model, sizes: list[int]) -> list[int]:
    """Each of `sizes`, or the largest among replicas that run in step."""
    if not _runs_in_step(model):
        return sizes
    shape: Tensor = max_over(model.parallel.dp_group)(torch.tensor(sizes, device=model.parallel.device))
    return [int(size) for size in shape.tolist()]
