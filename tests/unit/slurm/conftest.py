"""A job of three nodes, with stand-ins for SLURM's commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_slurm import Job

from megatron_rpp.config import Config


@pytest.fixture
def job(make: Callable[..., Config], tmp_path: Path) -> Job:
    changes = {"run.dir": str(tmp_path / "run"), "run.steps": 3, "parallel.data": 3, "slurm.max_tries": 2}
    batches = {"rollout.num_prompts": 3, "train.batch_size": 12}
    return Job(tmp_path, make({**changes, **batches, "watchdog.heartbeat_deadline_s": 3.0, "slurm.doctor": False}))
