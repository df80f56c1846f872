"""Rollouts to padded tensors, and a batch to equally shaped microbatches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rpp.experience.types import ExperienceBatch, Rollout


def collate(
    rollouts: Sequence[Rollout], rewards: Sequence[float], *, pad_token_id: int, device: torch.device
) -> ExperienceBatch:
    """One row a rollout, prompt then response, padded on the right to the longest."""
    width = max(len(r.prompt.token_ids) + len(r.response_ids) for r in rollouts)
    tokens = torch.full((len(rollouts), width), pad_token_id, dtype=torch.int64)
    loss_mask = torch.zeros(len(rollouts), width)
    rollout_logprobs = torch.zeros(len(rollouts), width)
    for row, rollout in enumerate(rollouts):
        start, end = len(rollout.prompt.token_ids), len(rollout.prompt.token_ids) + len(rollout.response_ids)
        tokens[row, :start] = torch.tensor(rollout.prompt.token_ids)
        tokens[row, start:end] = torch.tensor(rollout.response_ids)
        loss_mask[row, start:end] = 1.0
        rollout_logprobs[row, start:end] = torch.tensor(rollout.rollout_logprobs)
    return ExperienceBatch(
        tokens=tokens.to(device),
        loss_mask=loss_mask.to(device),
        rollout_logprobs=rollout_logprobs.to(device),
        rewards=torch.tensor(list(rewards), dtype=torch.float32, device=device),
        group_ids=torch.tensor([r.group_id for r in rollouts], device=device),
    )


def split_microbatches(
    batch: ExperienceBatch, size: int, *, count_multiple: int = 1, length_multiple: int = 1
) -> list[ExperienceBatch]:
    """Microbatches of `size` rows each, in order.

    Rows without response tokens fill the last one and, up to `count_multiple`, whole microbatches
    (an interleaved pipeline schedule wants a multiple of the stages). S is rounded up to
    `length_multiple` (sequence parallelism splits it evenly).
    """
    count = -(-len(batch) // size)
    count = -(-count // count_multiple) * count_multiple
    rows = count * size - len(batch)
    columns = -batch.tokens.shape[1] % length_multiple
    padded = {name: _pad(x, rows, columns if x.dim() == 2 else 0) for name, x in batch.tensors().items()}
    pieces = {name: x.split(size) for name, x in padded.items()}
    return [ExperienceBatch(**{name: parts[i] for name, parts in pieces.items()}) for i in range(count)]


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(x, (0, columns, 0, rows) if x.dim() == 2 else (0, rows))
