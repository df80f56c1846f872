"""Rollouts to padded tensors, and a batch to equally shaped microbatches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rpp.experience.types import ExperienceBatch, Rollout


def collate(
    rollouts: Sequence[Rollout],
    rewards: Sequence[float],
    greedy_rewards: Sequence[float] | None = None,
    *,
    minibatch_ids: Sequence[int] | None = None,
    pad_token_id: int,
    device: torch.device,
) -> ExperienceBatch:
    """One row a rollout, prompt then response, padded on the right to the longest.

    `greedy_rewards`, where the estimator wants them, has one value a rollout: of its prompt's greedy response.
    `minibatch_ids`: the optimizer step that trains each (engine/balance.py).
    """
    rows = [(r.prompt.token_ids, r.response_ids) for r in rollouts]
    tokens, loss_mask = pad_rows(rows, pad_token_id)
    rollout_logprobs = torch.zeros_like(loss_mask)
    rollout_logprobs[loss_mask != 0] = torch.tensor([x for r in rollouts for x in r.rollout_logprobs])
    return ExperienceBatch(
        tokens=tokens.to(device),
        loss_mask=loss_mask.to(device),
        rollout_logprobs=rollout_logprobs.to(device),
        rewards=torch.tensor(list(rewards), dtype=torch.float64, device=device),
        greedy_rewards=(
            None if greedy_rewards is None else torch.tensor(list(greedy_rewards), dtype=torch.float64, device=device)
        ),
        group_ids=torch.tensor([r.group_id for r in rollouts], dtype=torch.int64, device=device),
        minibatch_ids=(
            None if minibatch_ids is None else torch.tensor(list(minibatch_ids), dtype=torch.int64, device=device)
        ),
    )


def pad_rows(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """(prompt ids, response ids) rows to (tokens [B, S] int64, loss_mask [B, S] float32), padded on the right."""
    width = max((len(prompt) + len(response) for prompt, response in rows), default=1)
    tokens = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    loss_mask = torch.zeros(len(rows), width)
    for row, (prompt, response) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(response)
        tokens[row, :end] = torch.tensor([*prompt, *response])
        loss_mask[row, start:end] = 1.0
    return tokens, loss_mask


def split_microbatches(
    batch: ExperienceBatch,
    size: int,
    *,
    count_multiple: int = 1,
    length_multiple: int = 1,
    least_rows: int = 0,
    least_length: int = 0,
) -> list[ExperienceBatch]:
    """Microbatches of `size` rows each, in order.

    Rows without response tokens fill the last one and, up to `count_multiple`, whole microbatches
    (an interleaved pipeline schedule wants a multiple of the stages); there is at least one. S is rounded up to
    `length_multiple` (sequence parallelism splits it evenly). The batch is cut as if it had `least_rows`
    rows and `least_length` columns, where it has fewer.
    """
    count = -(-max(len(batch), least_rows, 1) // size)
    count = -(-count // count_multiple) * count_multiple
    rows = count * size - len(batch)
    length = max(batch.tokens.shape[1], least_length)
    columns = -(-length // length_multiple) * length_multiple - batch.tokens.shape[1]
    padded = {name: _pad(x, rows, columns) for name, x in batch.tensors().items()}
    pieces = {name: x.split(size) for name, x in padded.items()}
    return [ExperienceBatch(**{name: parts[i] for name, parts in pieces.items()}) for i in range(count)]


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(x, (0, columns, 0, rows) if x.dim() == 2 else (0, rows))
