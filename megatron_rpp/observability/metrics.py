"""Metrics as sums and counts, so that ranks and micro-batches of unequal size add up right.

metrics = Metrics()
metrics.add_mean("reward/mean", total=3.0, count=4)      # 4 responses on this rank
metrics = metrics.reduce(gather)                         # one exchange for all of them
metrics.as_dict()                                        # {"reward/mean": 0.75}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Metrics:
    """One step's numbers. A mean with no samples is left out, never NaN."""

    means: dict[str, tuple[float, float]] = field(default_factory=dict)  # name -> (sum, count)
    maxima: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)

    def add_mean(self, name: str, total: float, count: float) -> None:
        """Add `count` samples whose sum is `total`."""
        self._expect_kind(name, self.maxima)
        old_total, old_count = self.means.get(name, (0.0, 0.0))
        self.means[name] = (old_total + float(total), old_count + float(count))

    def add_value(self, name: str, value: float) -> None:
        """One sample; over ranks that all have it, or micro-batches, the mean."""
        self.add_mean(name, value, 1)

    def add_max(self, name: str, value: float) -> None:
        """The largest of all that are added, over all ranks."""
        self._expect_kind(name, self.means)
        self.maxima[name] = max(self.maxima.get(name, float(value)), float(value))

    def add_sum(self, name: str, value: float) -> None:
        """A count of something, which adds up over all ranks."""
        self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def merge(self, other: Metrics) -> None:
        """Add all that `other` holds."""
        for name, (total, count) in other.means.items():
            self.add_mean(name, total, count)
        for name, value in other.maxima.items():
            self.add_max(name, value)
        for name, value in other.sums.items():
            self.add_sum(name, value)

    def reduce(self, gather: Callable[[Metrics], Sequence[Metrics]]) -> Metrics:
        """The metrics of all ranks together, from one exchange.

        `gather` gives every rank's Metrics in rank order (`collectives.gather_objects`). Names may differ
        by rank: the last pipeline stage has losses that the others lack, so a flat vector would not line up.
        """
        return merged(gather(self))

    def as_dict(self) -> dict[str, float]:
        """Means, maxima and sums by name."""
        means = {name: total / count for name, (total, count) in self.means.items() if count}
        return means | self.maxima | self.sums

    def _expect_kind(self, name: str, others: Mapping[str, object]) -> None:
        assert name not in others, f"{name} is both a mean and a maximum"


def merged(parts: Iterable[Metrics]) -> Metrics:
    """The sum of several Metrics, in their order (float addition is not associative)."""
    result = Metrics()
    for part in parts:
        result.merge(part)
    return result
