"""A resumed run follows its own learning-rate settings; experts are reduced apart from the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rpp.config.schema import OptimizerConfig
from megatron_rpp.engine import optimizer as optimizer_module
from megatron_rpp.engine.optimizer import _reduce_experts_apart, _schedule
from megatron_rpp.model.shards import ShardedParameter


def schedule(lr: float, total_steps: int) -> tuple[Any, Any]:
    optimizer: Any = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    return optimizer, _schedule(optimizer, OptimizerConfig(lr=lr, lr_schedule="linear"), total_steps)


def test_resume_with_more_steps_does_not_train_at_the_old_schedules_end() -> None:
    _, saved = schedule(lr=1.0, total_steps=100)
    saved.step(increment=100)
    optimizer, resumed = schedule(lr=3.0, total_steps=200)
    resumed.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.5)  # halfway down from 3


def test_linear_schedule_falls_to_its_end() -> None:
    optimizer, running = schedule(lr=2.0, total_steps=4)
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        running.step(increment=1)
    assert seen == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_experts_alone_are_reduced_over_the_ranks_that_hold_the_same_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron leaves `allreduce` on where EP is 1, and then does not sum them over TP ranks with ETP 1."""
    dense, expert = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    expert.allreduce = True  # type: ignore[attr-defined]
    items = [ShardedParameter("a", dense, None, False), ShardedParameter("b", expert, None, False, ("b",))]
    monkeypatch.setattr(optimizer_module, "sharded_parameters", lambda chunks: items)
    model: Any = SimpleNamespace(chunks=[])
    _reduce_experts_apart(model)
    assert expert.allreduce is False and getattr(dense, "allreduce", True)  # type: ignore[attr-defined]
