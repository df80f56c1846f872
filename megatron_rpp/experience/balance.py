"""Sequences dealt out so that everyone's work takes about as long: a cost of a sequence, and a balanced partition."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SequenceCost:
    """What one sequence costs, in any unit: a term for each token, and one for each pair that attention looks at.

    A token of a sliding layer looks back over `window` tokens at most, so that there the cost grows no faster than
    the length once that is past the window.
    """

    linear: float  # of each token
    quadratic: float  # times tokens^2: attention over everything before
    sliding: float = 0.0  # as `quadratic`, of the layers that slide
    window: int = 0  # of those layers

    def __call__(self, tokens: int) -> float:
        seen = min(tokens, self.window)
        # Pairs of a causal window are tokens * seen - seen^2 / 2; the coefficients are of tokens^2 = twice the pairs.
        return self.linear * tokens + self.quadratic * tokens**2 + self.sliding * (2 * tokens - seen) * seen


def partition(costs: Sequence[float], count: int) -> list[list[int]]:
    """The indices of `costs` in `count` parts of about equal sum, each part ascending; the same everywhere.

    Largest differencing (Karmarkar and Karp): of the partial partitions the two with the largest spread become one,
    the heaviest parts of one with the lightest of the other. The largest sum exceeds the smallest by no more than the
    largest cost. A part is empty where there are fewer costs than parts.
    """
    assert count > 0, "at least one part"
    nothing: list[tuple[float, list[int]]] = [(0.0, [])] * (count - 1)
    # (-spread, a number that no two share, the parts by falling sum: each as (-sum, indices), which sorts fast)
    heap = [(-cost, i, [(-cost, [i]), *nothing]) for i, cost in enumerate(costs)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, number, wide), (_, _, narrow) = heapq.heappop(heap), heapq.heappop(heap)
        merged = [(a + b, of_a + of_b) for (a, of_a), (b, of_b) in zip(wide, reversed(narrow), strict=True)]
        merged.sort()
        heapq.heappush(heap, (merged[0][0] - merged[-1][0], number, merged))
    parts = [part for _, part in heap[0][2]] if heap else [[] for _ in range(count)]
    return [sorted(part) for part in parts]


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """The indices of `sizes` in parts of at most `capacity`, the largest first into the first part with room for it.

    At most 11/9 as many parts as are needed, and one more. A size above the capacity has a part of its own.
    """
    parts: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = next((part for part, left in enumerate(room) if sizes[i] <= left), len(parts))
        if place == len(parts):
            parts.append([])
            room.append(capacity)
        parts[place].append(i)
        room[place] -= sizes[i]
    return [sorted(part) for part in parts]


def imbalance(sums: Sequence[float]) -> float:
    """How far the largest is above the mean: the part of its time that the average one waits; 0 where all is 0."""
    mean = sum(sums) / len(sums)
    return max(sums) / mean - 1.0 if mean else 0.0
