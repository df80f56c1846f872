from __future__ import annotations

import pickle
import time

import pytest

from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.observability.timers import Timers


def test_ranks_with_unequal_counts_are_weighted_by_count() -> None:
    ranks = [Metrics(), Metrics()]
    ranks[0].add_mean("reward/mean", 3.0, 3)
    ranks[1].add_mean("reward/mean", 0.0, 1)
    assert ranks[0].reduce(lambda mine: ranks).as_dict() == {"reward/mean": 0.75}  # not the mean of means, 0.5


def test_ranks_may_hold_different_names() -> None:
    first, last = Metrics(), Metrics()
    first.add_max("length/max", 7)
    last.add_mean("loss/policy", 1.0, 2)
    last.add_max("length/max", 5)
    assert first.reduce(lambda mine: [mine, last]).as_dict() == {"loss/policy": 0.5, "length/max": 7.0}


def test_a_rank_without_samples_does_not_make_nan() -> None:
    metrics = Metrics()
    metrics.add_mean("kl/mean", 0.0, 0)
    assert metrics.as_dict() == {}


def test_a_maximum_of_negative_numbers_is_negative() -> None:
    metrics = Metrics()
    metrics.add_max("x", -3.0)
    metrics.add_max("x", -5.0)
    assert metrics.as_dict() == {"x": -3.0}


def test_values_of_micro_batches_are_averaged_and_reduce_leaves_the_rank_as_it_was() -> None:
    metrics = Metrics()
    metrics.add_value("lr", 1.0)
    metrics.add_value("lr", 3.0)
    other = pickle.loads(pickle.dumps(metrics))  # gather_objects pickles
    assert metrics.reduce(lambda mine: [mine, other]).as_dict() == {"lr": 2.0}
    assert metrics.means == {"lr": (4.0, 2.0)}


def test_counts_of_all_ranks_add_up() -> None:
    metrics = Metrics()
    metrics.add_sum("reward/timeouts", 0.0)
    metrics.add_sum("reward/timeouts", 2.0)
    other = Metrics()
    other.add_sum("reward/timeouts", 1.0)
    assert metrics.reduce(lambda mine: [mine, other]).as_dict() == {"reward/timeouts": 3.0}


def test_one_name_cannot_be_mean_and_maximum() -> None:
    metrics = Metrics()
    metrics.add_mean("x", 1.0, 1)
    with pytest.raises(AssertionError, match="x is both"):
        metrics.add_max("x", 1.0)


def test_timers_add_up_and_start_again_after_they_are_read() -> None:
    timers = Timers()
    for _ in range(2):
        with timers("rollout"):
            time.sleep(0.02)
    with pytest.raises(KeyError), timers("train"):
        raise KeyError
    assert timers.seconds("rollout") >= 0.04
    metrics = timers.as_metrics()
    assert set(metrics) == {"time/rollout", "time/train"} and 0.04 <= metrics["time/rollout"] < 1.0
    assert timers.as_metrics() == {}
