"""Rollouts to tensors: what sits where, and how a batch is cut into microbatches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rpp.experience.collate import collate, pad_rows, split_microbatches
from megatron_rpp.experience.types import ExperienceBatch, Prompt, Rollout, VersionSpan

PAD = 9
CPU = torch.device("cpu")


def rollout(prompt: tuple[int, ...], response: tuple[int, ...], logprobs: tuple[float, ...], group: int) -> Rollout:
    return Rollout(
        Prompt(0, "", prompt, ""), group, response, logprobs, "", "stop", (VersionSpan(0, 0, len(response)),)
    )


ROLLOUTS = [
    rollout((1, 2, 3), (4, 5), (-0.5, -0.25), group=3),
    rollout((6,), (7, 8, 7, 8), (-1.0, -2.0, -3.0, -4.0), group=3),
    rollout((2, 2), (), (), group=5),
]


def test_collate_matches_the_worked_example() -> None:
    """Every tensor is aligned with tokens: position t holds what belongs to token t."""
    batch = collate(ROLLOUTS, [1.0, -1.0, 0.5], pad_token_id=PAD, device=CPU)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 7, 8], [2, 2, PAD, PAD, PAD]]
    assert batch.loss_mask.tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert batch.rollout_logprobs.tolist() == [[0, 0, 0, -0.5, -0.25], [0, -1, -2, -3, -4], [0, 0, 0, 0, 0]]
    assert batch.rewards.tolist() == [1.0, -1.0, 0.5]
    assert batch.group_ids.tolist() == [3, 3, 5]
    assert batch.old_logprobs is None and batch.advantages is None


def test_a_pad_token_inside_a_response_is_still_trained_on() -> None:
    """The mask comes from lengths: where pad and stop token are the same id, the stop token must count."""
    tokens, mask = pad_rows([((1,), (PAD, 2, PAD)), ((PAD,), (3,))], PAD)
    assert tokens.tolist() == [[1, PAD, 2, PAD], [PAD, 3, PAD, PAD]]
    assert mask.tolist() == [[0, 1, 1, 1], [0, 1, 0, 0]]


def test_logprobs_of_another_length_than_the_response_are_refused() -> None:
    """Unchecked, one number for a whole batch is broadcast, and two rows whose lengths add up are shifted."""
    for response, logprobs in (((2, 3), (-1.0,)), ((2,), (-2.0, -3.0))):
        with pytest.raises((ValueError, AssertionError)):
            rollout((1,), response, logprobs, group=0)


def numbered_batch(rows: int, width: int) -> ExperienceBatch:
    """Every cell holds its own number, counted from 1, in every tensor."""
    cells = torch.arange(1, rows * width + 1).view(rows, width)
    return ExperienceBatch(
        tokens=cells,
        loss_mask=torch.ones(rows, width),
        rollout_logprobs=-cells.float(),
        rewards=torch.arange(1.0, rows + 1),
        group_ids=torch.arange(1, rows + 1),
        old_logprobs=cells.float() / 2,
    )


def test_rows_picks_the_same_rows_of_every_tensor() -> None:
    picked = numbered_batch(4, 2).rows(torch.tensor([3, 1]))
    assert picked.tokens.tolist() == [[7, 8], [3, 4]]
    assert picked.rewards.tolist() == [4, 2] and picked.group_ids.tolist() == [4, 2]
    assert picked.old_logprobs is not None and picked.old_logprobs.tolist() == [[3.5, 4], [1.5, 2]]
    assert picked.advantages is None


@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 7),
    size=st.integers(1, 4),
    count_multiple=st.integers(1, 4),
    length_multiple=st.integers(1, 4),
)
def test_split_keeps_every_row_in_order_and_fills_with_empty_rows(
    rows: int, width: int, size: int, count_multiple: int, length_multiple: int
) -> None:
    batch = numbered_batch(rows, width)
    pieces = split_microbatches(batch, size, count_multiple=count_multiple, length_multiple=length_multiple)
    needed = -(-rows // size)
    assert len(pieces) % count_multiple == 0 and 0 <= len(pieces) - needed < count_multiple
    assert all(len(piece) == size for piece in pieces)  # the pipeline wants equal shapes
    padded_width = pieces[0].tokens.shape[1]
    assert padded_width % length_multiple == 0 and 0 <= padded_width - width < length_multiple
    for name, original in batch.tensors().items():
        joined = torch.cat([piece.tensors()[name] for piece in pieces])
        assert joined.dtype == original.dtype
        real, fill = joined[:rows], joined[rows:]
        if original.dim() == 2:
            assert (real[:, width:] == 0).all()
            real = real[:, :width]
        assert torch.equal(real, original), name
        assert (fill == 0).all(), f"{name} of a fill row would be trained on"


def test_a_smaller_batch_is_cut_like_the_largest_one_it_is_exchanged_with() -> None:
    """Replicas whose tokens meet in the same experts run equally many microbatches of one shape."""
    batch = numbered_batch(3, 5)
    pieces = split_microbatches(batch, 2, count_multiple=2, length_multiple=4, least_rows=9, least_length=7)
    assert [tuple(piece.tokens.shape) for piece in pieces] == [(2, 8)] * 6  # 9 rows: 5, and an even number of them
    assert torch.equal(torch.cat([piece.tokens for piece in pieces])[:3, :5], batch.tokens)
    assert sum(piece.loss_mask.sum() for piece in pieces) == 15
    larger = split_microbatches(numbered_batch(9, 7), 2, count_multiple=2, length_multiple=4, least_rows=3)
    assert [tuple(piece.tokens.shape) for piece in larger] == [(2, 8)] * 6


def test_split_without_optional_tensors_leaves_them_out() -> None:
    batch = collate(ROLLOUTS, [0.0, 0.0, 0.0], pad_token_id=PAD, device=CPU)
    assert all(piece.old_logprobs is None for piece in split_microbatches(batch, 2))


def test_a_replica_without_rollouts_has_a_microbatch_that_trains_nothing() -> None:
    """It takes part in every collective of the step."""
    batch = collate([], [], pad_token_id=PAD, device=CPU)
    assert len(batch) == 0
    pieces = split_microbatches(batch, 2)
    assert [tuple(piece.tokens.shape) for piece in pieces] == [(2, 1)] and pieces[0].loss_mask.sum() == 0
