from __future__ import annotations

import io

import pytest

from megatron_rpp.observability.terminal import Terminal

STEP = {
    "reward/mean": 0.5,
    "eval/accuracy": 0.25,
    "kl/mean": 0.0123,
    "loss/total": -0.5,
    "clip/fraction": 0.1,
    "tokens_per_second": 1234.0,
    "time/sync": 0.5,
}


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_each_step_is_one_plain_line() -> None:
    out = io.StringIO()
    with Terminal(0, 2, out) as terminal:
        terminal.update_progress(1, 8)
        terminal.step(0, STEP)
        terminal.step(1, {"reward/mean": 1.0})
    first, second = out.getvalue().splitlines()
    wanted = "step 0  reward 0.500  accuracy 25.0%  KL 0.0123  loss -0.5000  clip 10.00%  tokens/s 1,234  "
    assert first.startswith(wanted + "sync s 0.50  ETA 0:00:")
    assert second.startswith("step 1  reward 1.000  accuracy -") and second.endswith("ETA 0:00:00")


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        ({"eval/accuracy": 0.5, "eval/aime/accuracy": 0.0}, "accuracy 50.0%"),
        ({"eval/aime/accuracy": 0.25, "eval/gsm8k/accuracy": 0.75, "eval/essays/reward": 9.0}, "accuracy 50.0%"),
        ({"eval/essays/reward": 9.0, "eval/aime/greedy_accuracy": 1.0}, "accuracy -"),
    ],
)
def test_the_accuracy_is_the_unnamed_sets_else_the_mean_of_the_named(metrics: dict[str, float], shown: str) -> None:
    out = io.StringIO()
    with Terminal(0, 1, out) as terminal:
        terminal.step(0, {"reward/mean": 1.0, **metrics})
    assert f"  {shown}  " in out.getvalue()


def test_on_a_terminal_the_table_shows_progress_and_steps() -> None:
    screen = Screen()
    with Terminal(5, 8, screen) as terminal:
        terminal.update_progress(3, 8)
        assert "sampling 3/8" in screen.getvalue()
        terminal.step(5, STEP)
    shown = screen.getvalue()
    assert "0.500" in shown and "1,234" in shown


def test_every_column_fits_a_terminal_of_80_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    screen = Screen()
    with Terminal(0, 10_000, screen) as terminal:
        wide = {"tokens_per_second": 123_456.0, "time/sync": 100.0, "loss/total": -10.0, "memory/peak_gib/train": 139.0}
        terminal.step(1000, {**STEP, **wide})
    assert "…" not in screen.getvalue() and "tokens/s" in screen.getvalue()


def test_on_gpus_the_phase_that_takes_most_memory_is_shown() -> None:
    out = io.StringIO()
    with Terminal(0, 1, out) as terminal:
        peaks = {"memory/peak_gib/score": 12.0, "memory/peak_gib/train": 61.25, "memory/allocated_gib/train": 99.0}
        terminal.step(0, {**STEP, **peaks})
    assert "  GiB 61  ETA" in out.getvalue()


def test_the_remaining_time_counts_only_steps_of_this_process() -> None:
    terminal = Terminal(90, 100, io.StringIO())
    terminal._start -= 60.0  # this process has run for a minute
    assert round(terminal._remaining_s(91)) == 240  # 2 steps took 60 s; 8 remain
