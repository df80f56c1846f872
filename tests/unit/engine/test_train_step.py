"""How a rollout batch becomes mini-batches and their sums become metrics; the optimizer step is a stand-in."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rpp.config.schema import Config, TrainConfig
from megatron_rpp.engine import train_step as module
from megatron_rpp.engine.heads import ALL_POSITIONS, REAL_POSITIONS, PolicyHead
from megatron_rpp.experience.types import ExperienceBatch

WIDTH = 4


def make_batch(token_counts: list[int]) -> ExperienceBatch:
    rows = len(token_counts)
    mask = (torch.arange(WIDTH) < torch.tensor(token_counts)[:, None]).float()
    cells = torch.zeros(rows, WIDTH)
    ids = torch.arange(rows)
    return ExperienceBatch(cells.long(), mask, cells, ids.float(), ids)


class Steps:
    """Stands in for optimizer_step: what each one was given; its ratio is 1 at first, then 1.5."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.denominators: list[float] = []
        self.sequence_counts: list[float] = []
        self.micro_batch_sizes: list[int] = []

    def __call__(
        self, policy: Any, optimizer: Any, batch: ExperienceBatch, head: PolicyHead, train: TrainConfig
    ) -> tuple[dict[str, float], float]:
        ratio = 1.0 if not self.rows else 1.5
        self.rows.append(batch.group_ids.tolist())
        self.denominators.append(head.global_token_count)
        self.sequence_counts.append(head.global_sequence_count)
        self.micro_batch_sizes.append(train.micro_batch_size)
        tokens = batch.loss_mask.sum().item()
        optimizer.lr /= 2
        sums = {"loss/total": 2.0 * tokens * ratio, "ratio/mean": tokens * ratio}
        return sums | {REAL_POSITIONS: tokens, ALL_POSITIONS: float(len(batch) * WIDTH)}, 10.0 * len(self.rows)


def run(
    monkeypatch: pytest.MonkeyPatch,
    token_counts: list[int],
    batch_size: int,
    dp_size: int = 1,
    minibatch_ids: list[int] | None = None,
    last_elsewhere: int = -1,
    tokens_elsewhere: int = 0,
) -> tuple[Steps, dict[str, float]]:
    steps = Steps()
    monkeypatch.setattr(module, "optimizer_step", steps)

    # As if every replica held the same rows.
    def counts(batch: ExperienceBatch, _: Any) -> tuple[float, float]:
        return batch.loss_mask.sum().item() * dp_size + tokens_elsewhere, batch.loss_mask.any(
            dim=1
        ).sum().item() * dp_size

    monkeypatch.setattr(module, "global_counts", counts)
    monkeypatch.setattr(module, "logprob_head", lambda *_: None)
    parallel = SimpleNamespace(dp_size=dp_size, dp_group=None, device=torch.device("cpu"))
    policy: Any = SimpleNamespace(parallel=parallel, chunks=[])
    monkeypatch.setattr(module, "max_over", lambda _: lambda x: x.clamp(min=last_elsewhere))
    optimizer: Any = SimpleNamespace(lr=1e-3)
    config = Config(train=TrainConfig(batch_size=batch_size, micro_batch_size=2))
    batch = make_batch(token_counts)
    if minibatch_ids is not None:
        batch = replace(batch, minibatch_ids=torch.tensor(minibatch_ids, dtype=torch.int64))
    return steps, module.train_step(policy, optimizer, batch, config)


def test_minibatches_take_their_share_of_rows_in_order_with_their_own_global_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, _ = run(monkeypatch, [1, 2, 3, 4, 1, 1], batch_size=4, dp_size=2)
    assert steps.rows == [[0, 1], [2, 3], [4, 5]]
    assert steps.denominators == [6.0, 14.0, 4.0]
    assert steps.sequence_counts == [4.0, 4.0, 4.0]
    assert steps.micro_batch_sizes == [2, 2, 2]


def test_minibatch_ids_say_which_rows_are_whose_and_a_minibatch_may_have_none_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every replica takes part in every mini-batch, or the others wait for it: another one has rows of 3."""
    elsewhere = {"last_elsewhere": 3, "tokens_elsewhere": 1}
    steps, _ = run(monkeypatch, [1, 2, 3, 4], 1, minibatch_ids=[2, 0, 0, 2], **elsewhere)
    assert steps.rows == [[1, 2], [], [0, 3], []]


def test_padding_waste_is_the_part_of_all_positions_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    _, stats = run(monkeypatch, [1, 2, 3, 4, 1, 1], batch_size=4)
    assert stats["train/padding_waste"] == pytest.approx(1 - 12 / 24)
    assert not {REAL_POSITIONS, ALL_POSITIONS} & stats.keys()


def test_metrics_are_token_means_over_the_rollout_batch_not_means_of_minibatch_means(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Mini-batches of 1 and 3 tokens with ratios 1 and 1.5: (1 + 4.5) / 4, not 1.25."""
    _, stats = run(monkeypatch, [1, 0, 2, 1], batch_size=2)
    assert stats["ratio/mean_all"] == pytest.approx(5.5 / 4)
    assert stats["loss/total"] == pytest.approx(2 * 5.5 / 4)
    assert stats["ratio/mean"] == 1.0  # of the first mini-batch, before any update
    assert stats["grad_norm"] == 15.0
    assert stats["lr"] == 1e-3  # before the schedule moved on


def test_a_minibatch_without_tokens_takes_no_optimizer_step(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, stats = run(monkeypatch, [2, 2, 0, 0], batch_size=2)
    assert steps.denominators == [4.0]
    assert stats["ratio/mean_all"] == 1.0


def test_a_batch_without_tokens_is_an_error_that_says_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no response of this step has a token"):
        run(monkeypatch, [0, 0], batch_size=2)


def test_ratio_of_a_first_minibatch_without_tokens_is_not_reported_as_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    _, stats = run(monkeypatch, [0, 0, 2, 2], batch_size=2)
    assert stats["ratio/mean"] != 0.0


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch, norm: float) -> None:
    """Without a loss scaler `MegatronOptimizer.step` always returns True; only the norm tells."""
    monkeypatch.setattr(module, "run_pipeline", lambda *_, **__: {"loss/total": torch.zeros(())})
    monkeypatch.setattr(module, "sum_over", lambda _: lambda x: x)
    megatron = SimpleNamespace(zero_grad=lambda: None, step=lambda: (True, norm, None))
    optimizer: Any = SimpleNamespace(megatron=megatron, schedule=SimpleNamespace(step=lambda increment: None))
    in_bfloat16 = SimpleNamespace(fp8=None, fp8_recipe=None)
    model: Any = SimpleNamespace(chunks=[], config=in_bfloat16, parallel=SimpleNamespace(dp_group=None))
    head: Any = None
    with pytest.raises(FloatingPointError):
        module.optimizer_step(model, optimizer, make_batch([1]), head, TrainConfig())
