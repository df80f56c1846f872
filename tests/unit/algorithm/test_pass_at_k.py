"""pass@k and maj@k, against every draw of k samples and by hand."""

from __future__ import annotations

from itertools import combinations

import pytest

from megatron_rpp.algorithm.pass_at_k import maj_at_k, pass_at_k


@pytest.mark.parametrize(("samples", "right"), [(n, c) for n in range(1, 7) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_sample(samples: int, right: int) -> None:
    verdicts = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        draws = [any(draw) for draw in combinations(verdicts, k)]
        assert pass_at_k(samples, right, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    assert pass_at_k(10_000, 5_000, 1) == 0.5
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("votes", "right", "k", "expected"),
    [
        ("aab", (1, 1, 0), 3, 1.0),
        ("abb", (1, 0, 0), 3, 0.0),
        ("ab", (1, 0), 2, 1.0),  # a tie: the first seen
        ("ba", (0, 1), 2, 0.0),
        ("abbaaa", (1, 0, 0, 1, 1, 1), 3, 0.5),  # two blocks: abb, aaa
        ("abbaaaa", (1, 0, 0, 1, 1, 1, 1), 3, 0.5),  # the seventh is left over
        ("ab", (1, 0), 1, 0.5),
    ],
)
def test_maj_at_k_by_hand(votes: str, right: tuple[int, ...], k: int, expected: float) -> None:
    assert maj_at_k(list(votes), [bool(x) for x in right], k) == expected


def test_samples_without_an_answer_do_not_vote_however_many() -> None:
    assert maj_at_k([None, None, None, "a"], [False, False, False, True], 4) == 1.0
    assert maj_at_k([None, None], [False, False], 2) == 0.0
