"""A batch cut into microbatches: padded rows as they are, or sequences packed end to end, shared out over CP ranks.

    rows       [ A A A . . ]    packed     [ A A A | B B B B B ]    cu_seqlens [0, 3, 8]
               [ B B B B B ]

A packed sequence has a slot. Its length is rounded up to a multiple of 2 * cp_size, and what is left up to T is a
slot of its own. Padding stands behind all tokens of its slot, where causal attention never sees it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rpp.experience.balance import SequenceCost, first_fit, partition
from megatron_rpp.experience.types import ExperienceBatch

_MOST_TRIES = 8  # numbers of microbatches below that of first fit: a partition of 512 rows takes a tenth of a second


@dataclass(frozen=True)
class Microbatch:
    """What the model is given in one forward pass, and whose rows these are.

    C is this rank's share of the tokens: T / cp_size where sequences are packed.
    """

    rows: ExperienceBatch  # [b, S], whole on every CP rank; rows that only fill up stand at the end
    index: Tensor  # [n] int64, n <= b: where the first n rows stand in the batch
    tokens: Tensor  # [b, S] or [1, C] int64: the model's input
    logits_at: Tensor  # [b, S] int64: which of the logits [b * S or C] stands at a position; -1: not on this rank
    positions: int  # that the model runs over, on all CP ranks together
    cu_seqlens: Tensor | None = None  # [slots + 1] int32, where slots begin among the T packed tokens; None: padded
    bounds: tuple[int, ...] = ()  # as cu_seqlens

    @property
    def width(self) -> int:
        """Sequences that the model is given, as Megatron counts them: packed ones are one."""
        return self.tokens.shape[0]

    @property
    def real_positions(self) -> int:
        """Positions with a token of a prompt or a response."""
        return int(lengths_of(self.rows.loss_mask).sum())


@dataclass(frozen=True)
class PackingRule:
    """How sequences are packed."""

    budget: int  # tokens a microbatch; a longer sequence is alone
    cp_size: int = 1
    cp_rank: int = 0
    unit: int = 1  # each CP rank's tokens are a multiple of it: tp_size under sequence parallelism, and more for FP8

    @property
    def slot_multiple(self) -> int:
        """Of a slot's length: each CP rank takes two chunks of it."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    @property
    def total_multiple(self) -> int:
        """Of T."""
        return math.lcm(self.slot_multiple, self.cp_size * self.unit)


def lengths_of(loss_mask: Tensor) -> Tensor:
    """[B] int64: tokens of each row up to its last response token. Nothing behind that is ever used, so a row
    without response tokens has none."""
    ends = torch.arange(1, loss_mask.shape[1] + 1, device=loss_mask.device)
    return ((loss_mask != 0) * ends).amax(dim=1)


def padded(rows: ExperienceBatch, index: Tensor | None = None) -> Microbatch:
    """The rows [b, S] as they are; without an index, of a batch that has no others."""
    b, width = rows.tokens.shape
    index = torch.arange(b, device=rows.tokens.device) if index is None else index
    places = torch.arange(b * width, device=rows.tokens.device).view(b, width)
    return Microbatch(rows, index, rows.tokens, places, b * width)


def cut(
    lengths: Sequence[int], rule: PackingRule, cost: SequenceCost, *, count_multiple: int = 1, of_one_length: bool
) -> list[list[int]]:
    """The rows of each microbatch: as few microbatches as the budget allows, of about equal cost.

    Rows of length 0 are left out. Microbatches may be empty; there is at least one. Partitions are tried from the
    least number that could do up to that of first fit, which stands where no balanced one keeps the budget.

    Args:
        count_multiple: their number is a multiple of it.
        of_one_length: they will all be padded to the longest, so that they are balanced by tokens instead.
    """
    rows = [i for i, length in enumerate(lengths) if length]
    slots = [_up(lengths[i], rule.slot_multiple) for i in rows]
    by_tokens = [float(slot) for slot in slots]
    weights = [by_tokens] if of_one_length else [[cost(slot) for slot in slots], by_tokens]
    fitted = first_fit(slots, rule.budget)
    most = _up(max(1, len(fitted)), count_multiple)
    for count in _counts(_up(_least_count(slots, rule.budget), count_multiple), most, count_multiple):
        for each in weights:
            parts = partition(each, count)
            if all(len(part) < 2 or sum(slots[i] for i in part) <= rule.budget for part in parts):
                return [[rows[i] for i in part] for part in parts]
    return [[rows[i] for i in part] for part in fitted] + [[] for _ in range(most - len(fitted))]


def _least_count(slots: Sequence[int], budget: int) -> int:
    """No fewer microbatches can hold the slots: by their tokens, and as no two above half the budget share one."""
    return max(1, -(-sum(min(slot, budget) for slot in slots) // budget), sum(2 * slot > budget for slot in slots))


def _counts(least: int, most: int, multiple: int) -> list[int]:
    """Multiples of `multiple` from `least` to `most`, both of them; where there are too many to try, some."""
    stride = max(1, -(-(most - least) // (multiple * _MOST_TRIES)))
    return [*range(least, most, stride * multiple), most]


def packed_length(lengths: Sequence[int], rule: PackingRule) -> int:
    """T of the sequences, packed; at least the smallest T that there is."""
    return _up(max(1, sum(_up(length, rule.slot_multiple) for length in lengths)), rule.total_multiple)


def pack(batch: ExperienceBatch, index: Sequence[int], rule: PackingRule, least_tokens: int = 0) -> Microbatch:
    """The rows `index` of the batch end to end, T at least `least_tokens`, and of that this CP rank's share."""
    at = torch.tensor(index, dtype=torch.int64, device=batch.tokens.device)
    rows = batch.rows(at) if index else _one_empty_row(batch)
    lengths = lengths_of(rows.loss_mask)
    known = lengths.tolist()
    assert all(known) or not index, "a row without response tokens has no slot"
    total = _up(max(packed_length(known, rule), least_tokens), rule.total_multiple)
    slots = [_up(length, rule.slot_multiple) for length in known if length]
    bounds = [*accumulate(slots, initial=0)] + ([total] if sum(slots) < total else [])
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=at.device)
    columns = torch.arange(rows.tokens.shape[1], device=at.device)
    places = (cu_seqlens[: len(known), None] + columns).long()  # [b, S]: a token's place among the T
    is_real = columns < lengths[:, None]
    packed = rows.tokens.new_zeros(total)
    packed[places[is_real]] = rows.tokens[is_real]
    own = zigzag(bounds, rule.cp_size)[rule.cp_rank].to(at.device)
    local = torch.full_like(packed, -1)
    local[own] = torch.arange(len(own), device=at.device)
    logits_at = torch.full_like(places, -1)
    logits_at[is_real] = local[places[is_real]]
    return Microbatch(rows, at, packed[own][None], logits_at, total, cu_seqlens, tuple(bounds))


def zigzag(bounds: Sequence[int], cp_size: int) -> Tensor:
    """[cp_size, T / cp_size] int64: which packed tokens each CP rank holds, in its own order.

    Each slot is cut into 2 * cp_size chunks, of which rank r has chunk r and the r-th from the end, so that causal
    attention costs every rank the same. Transformer Engine and Megatron's `_get_thd_freqs_on_this_cp_rank` deal so.
    """
    if cp_size == 1:
        return torch.arange(bounds[-1])[None]
    slots = [torch.arange(start, end).view(2, cp_size, -1) for start, end in pairwise(bounds)]
    shares = [torch.cat([slot[0], slot[1].flip(0)], dim=1) for slot in slots]  # [cp_size, two chunks]
    return torch.cat(shares, dim=1)


def _one_empty_row(batch: ExperienceBatch) -> ExperienceBatch:
    """A row of zeros, for a microbatch without rows: heads have no case of their own for that."""
    return ExperienceBatch(
        **{name: F.pad(x[:0], (0, 0, 0, 1) if x.dim() == 2 else (0, 1)) for name, x in batch.tensors().items()}
    )


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
