"""A resumed run follows its own learning-rate settings, from the step where the checkpoint stopped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rpp.config.schema import OptimizerConfig
from megatron_rpp.engine.optimizer import _schedule


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
