"""Statistics of the responses to one prompt, wherever in the global batch they are."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rpp.algorithm.masked import Moments, ReduceSum, two_pass_moments

MAX_GROUPS = 2**22
_BITS = 64  # of a group id


def group_moments(x: Tensor, group_ids: Tensor, reduce_sum: ReduceSum) -> Moments:
    """Moments of each row's group, [B] each: row b has those of all rows with its group id, on any rank.

    Args:
        x: [B] one value a response.
        group_ids: [B] int64, the same for all responses to one prompt; small numbers, such as the position
            of the prompt in the batch.

    Raises:
        ValueError: an id that is negative or not below 4,194,304; on every rank alike.
    """
    size = _table_size(group_ids, reduce_sum)
    moments = two_pass_moments(
        x.double(),
        torch.bincount(group_ids, minlength=size).double(),
        lambda v: torch.zeros(size, dtype=torch.float64, device=v.device).index_add(0, group_ids, v),
        lambda cells: cells[group_ids],
        reduce_sum,
    )
    of_row = {name: table[group_ids] for name, table in vars(moments).items()}
    return Moments(**of_row)


def _table_size(group_ids: Tensor, reduce_sum: ReduceSum) -> int:
    """A power of two above every rank's ids. A sum can tell: each rank marks the highest bit that it uses."""
    marks = torch.zeros(_BITS + 1, dtype=torch.float64, device=group_ids.device)
    if len(group_ids):
        lowest, highest = group_ids.aminmax()
        marks[_BITS if lowest < 0 else int(highest).bit_length()] = 1.0
    used = reduce_sum(marks).nonzero()
    size = 2 ** int(used.amax()) if len(used) else 1
    if size > MAX_GROUPS:
        raise ValueError(f"group_ids must be from 0 to {MAX_GROUPS - 1}; number the prompts of the batch from 0")
    return size
