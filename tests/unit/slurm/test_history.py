"""What earlier starts of a run came to decides whether there is another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rpp.slurm.history import History, Try, steps_done


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path)


def play(history: History, *endings: tuple[str, int, int, tuple[str, ...]]) -> None:
    """(ending, first step, last step, bad nodes) of one try after the other."""
    for number, (ending, first, last, bad) in enumerate(endings):
        history.begin(f"{number}.0", ["a", "b"], first)
        history.end(f"{number}.0", ending, "some cause", last, bad)


def test_only_failures_that_reach_no_new_step_count_towards_the_limit(history: History) -> None:
    play(history, (Try.FAILED, 0, 0, ()), (Try.FAILED, 0, 3, ()), (Try.FAILED, 2, 3, ()), (Try.LOST_NODES, 1, 2, ()))
    assert history.in_vain() == 2, "going from checkpoint 2 to step 3 again and again is no progress"


def test_a_stop_that_was_asked_for_is_not_in_vain(history: History) -> None:
    play(history, (Try.FAILED, 0, 0, ()), (Try.STOPPED, 0, 0, ()))
    assert history.in_vain() == 0


def test_bad_nodes_stay_excluded_in_later_jobs(history: History) -> None:
    play(history, (Try.LOST_NODES, 0, 2, ("b",)), (Try.STOPPED, 2, 4, ()), (Try.FAILED, 4, 4, ("c", "b")))
    assert history.excluded() == ["c", "b"], "the newest last"


def test_a_try_that_ended_without_a_word_counts_as_failed(history: History) -> None:
    history.begin("1.0", ["a"], first_step=2)
    history.begin("2.0", ["a"], first_step=2)
    first, second = history.tries()
    assert (first.ending, first.cause) == (Try.FAILED, "it ended without a word")
    assert second.ending == Try.RUNNING and history.in_vain() == 0


def test_steps_done_does_not_count_a_line_that_was_cut_off(tmp_path: Path) -> None:
    assert steps_done(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0}) + "\n" + json.dumps({"step": 1}) + '\n{"step": 2')
    assert steps_done(tmp_path) == 2
