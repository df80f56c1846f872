"""pass@k and maj@k of one prompt, from the verdicts and answers of its samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The probability that at least one of k samples is right: 1 - C(n - c, k) / C(n, k).

    The unbiased estimate from n samples of which c are right (Chen et al. 2021, arXiv 2107.03374).
    """
    assert 1 <= k <= num_samples and 0 <= num_right <= num_samples, "k of n samples, c of them right"
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def maj_at_k(votes: Sequence[Hashable | None], right: Sequence[bool], k: int) -> float:
    """The share of blocks of k samples, in their order, whose most frequent answer is right.

    n samples make n // k disjoint blocks, each an independent draw of k; what is left over is not used. Of equally
    frequent answers the first seen wins; its verdict is that of the first sample that gave it.

    Args:
        votes: of each sample, what its answer is equal to others by; None: it gives no answer and does not vote.
        right: of each sample, the verdict.
        k: samples that vote.
    """
    assert 1 <= k <= len(votes) == len(right), "k of n samples, with a verdict each"
    starts = range(0, len(votes) - k + 1, k)
    return sum(_majority_is_right(votes[i : i + k], right[i : i + k]) for i in starts) / len(starts)


def _majority_is_right(votes: Sequence[Hashable | None], right: Sequence[bool]) -> bool:
    counts = Counter(vote for vote in votes if vote is not None)  # most_common keeps the order of insertion
    return bool(counts) and right[votes.index(counts.most_common(1)[0][0])]
