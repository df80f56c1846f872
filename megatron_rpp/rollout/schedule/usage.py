"""How well a step's sampling kept the servers busy."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rpp.rollout.sampler import Flight


def usage_metrics(flights: Sequence[Flight], ends: Sequence[float]) -> dict[str, float]:
    """rollout/tail_s and rollout/idle_fraction of one phase; nothing where nothing was sampled.

    Args:
        flights: all requests of all replicas.
        ends: when each group that is trained on was complete, in seconds since the phase began.
    """
    if not flights or not ends:
        return {}
    end = max(flight.end for flight in flights)
    half = sorted(ends)[(len(ends) - 1) // 2]
    return {"rollout/tail_s": max(end - half, 0.0), "rollout/idle_fraction": idle_fraction(flights)}


def idle_fraction(flights: Sequence[Flight]) -> float:
    """How far the samples in flight, on average until the last ended, were below the most at one moment.

    A lower bound of the servers' idleness: a request counts with all its samples until its last one ends.
    """
    changes = sorted([(f.start, f.samples) for f in flights] + [(f.end, -f.samples) for f in flights])
    now = most = 0
    area = last = 0.0
    for moment, change in changes:
        area, last = area + now * (moment - last), moment
        now += change
        most = max(most, now)
    return 1.0 - area / (most * last) if most and last else 0.0
