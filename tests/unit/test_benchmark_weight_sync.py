"""The weight-sync benchmark's figures are of what its keys name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.weight_sync import delta_bytes_fraction, summarize_memory, summarize_speed
from benchmarks.weight_sync_delta import all_series, fractions, random_batch
from benchmarks.weight_sync_plain import PlainTransfers


def report(send_s: float, wall_s: float, peak_bytes: int = 0) -> dict[str, float]:
    return {"send_s": send_s, "wall_s": wall_s, "peak_bytes": peak_bytes}


SPEED = {
    "bytes": 1000,
    "largest_parameter": 400,
    "plain": {"broadcast": [1.0, 3.0, 2.0], "copy": [0.5, 0.5, 0.5]},
    "syncs": {
        "off": [report(4.0, 5.0, 150), report(8.0, 10.0, 100), report(2.5, 3.0, 90)],
        "full": [report(6.0, 16.0, 110), report(6.0, 8.0, 170), report(7.0, 20.0, 120)],
    },
}


def test_ratios_are_rates_over_the_plain_broadcasts_and_take_the_right_part_of_the_right_sync() -> None:
    rates = summarize_speed(SPEED)
    assert rates["broadcast_over_raw"] == 2.0 / 4.0  # medians: send with verify=off
    assert rates["broadcast_over_raw_fastest"] == 1.0 / 2.5
    assert rates["verified_send_over_raw"] == 2.0 / 6.0
    assert rates["unverified_sync_over_raw"] == 2.0 / 5.0
    assert rates["verified_over_raw"] == 2.0 / 16.0  # the whole sync with verify=full


def test_the_peak_is_the_worst_rank_of_the_worst_sync() -> None:
    found = summarize_memory({1: {"peak_bytes": [170]}, 2: {"peak_bytes": [50, 260]}}, 100)
    assert found == {"peak_tp1_buckets": 1.7, "peak_tp2_buckets": 2.6, "peak_extra_buckets": 2.6}


def test_the_delta_fraction_is_the_worst_at_the_papers_rate_in_bfloat16() -> None:
    found = [
        {"series": "paper, one step", "dtype": "bfloat16", "fractions": [0.2, 0.3, 0.1]},
        {"series": "paper, one step", "dtype": "float32", "fractions": [1.3]},
        {"series": "demo", "dtype": "bfloat16", "fractions": [0.9]},
    ]
    assert delta_bytes_fraction(found) == 0.3
    assert fractions([200, 50, 100]) == [0.25, 0.5]


def test_the_series_train_at_the_papers_and_the_demos_learning_rate() -> None:
    one, eight, demo = all_series("bfloat16")
    assert one.optimizer.lr == eight.optimizer.lr == 5e-7
    assert (demo.optimizer.lr, demo.steps_per_sync, demo.total_steps) == (2e-4, 4, 400)
    assert demo.syncs * demo.steps_per_sync > demo.optimizer.warmup_steps, "the peak rate is never reached"


def test_the_batch_has_a_gradient_for_every_response() -> None:
    batch = random_batch(50)
    assert batch.loss_mask.sum(dim=1).min() > 0 and batch.rewards.std() > 0


def test_plain_transfers_measure_both_kinds_again_and_again_and_end_their_processes(tmp_path: Path) -> None:
    with PlainTransfers([1 << 20, 1 << 18], tmp_path / "pair") as transfers:
        seconds = [transfers.broadcast_s(), transfers.copy_s(), transfers.broadcast_s()]
        processes = transfers._processes
    assert all(0 < each < 60 for each in seconds)
    assert [process.returncode for process in processes] == [0, 0]


def test_bytes_really_arrive_at_the_plain_broadcasts_receiver(tmp_path: Path) -> None:
    """A receiver alone never answers: the broadcast's time is not that of a call that sends nothing."""
    given = ["1", "2", json.dumps([64]), str(tmp_path / "store")]
    command = [sys.executable, "-m", "benchmarks.weight_sync_plain", *given]
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(command, input="broadcast\n", text=True, timeout=8, capture_output=True)
