"""Prompts that a step has left out."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rpp.observability.reporter import Reporter
from megatron_rpp.observability.rollouts import Skipped, skipped_path


def test_a_step_that_is_run_again_does_not_keep_what_it_left_out_before(tmp_path: Path) -> None:
    with Reporter(str(tmp_path), rank=1, replica=0, steps=range(3)) as reporter:
        reporter.step(2, {}, [], [], [Skipped(7, 0, 1.0), Skipped(3, 5, 0.0)])
        first = [json.loads(line) for line in skipped_path(tmp_path, 2).open()]
        assert first[1] == {"prompt_id": 3, "group_id": 5, "reward": 0.0} and len(first) == 2
        reporter.step(2, {}, [], [])
    assert not skipped_path(tmp_path, 2).exists()


def test_only_the_first_replica_writes_for_all(tmp_path: Path) -> None:
    with Reporter(str(tmp_path), rank=1, replica=1, steps=range(3)) as reporter:
        reporter.step(2, {}, [], [], [Skipped(7, 0, 1.0)])
    assert not skipped_path(tmp_path, 2).exists()
