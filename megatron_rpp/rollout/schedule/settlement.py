"""What became of each prompt that a step has drawn. Pure, and the same on every rank."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from megatron_rpp.rollout.sampler import Flight


@dataclass(frozen=True)
class Report:
    """What one replica's leader tells all ranks of its part in a step."""

    complete: dict[int, float] = field(default_factory=dict)  # index in the draw -> end, of groups to be trained on
    skipped: dict[int, float] = field(default_factory=dict)  # index -> the reward that all its responses earned
    started: frozenset[int] = frozenset()  # indices that servers were asked for
    aborted: int = 0  # groups
    tokens: int = 0  # of the responses of complete groups
    flights: tuple[Flight, ...] = ()


@dataclass(frozen=True)
class Settlement:
    """Indices in the draw; each below `drawn` is in one of the five."""

    kept: list[int]  # trained on
    skipped: dict[int, float]  # used up without training -> reward
    deferred: list[int]  # aborted, and drawn again by a later step
    surplus: list[int]  # complete, but more than are wanted: drawn again, too, and not counted as put off
    unasked: list[int]  # no server was asked: as surplus
    drawn: int  # so many first ones of the draw


def settle(reports: Sequence[Report], groups: int, awaited: Collection[int] = ()) -> Settlement:
    """Of the complete ones `groups` are kept, `awaited` ones first, then by the draw's order; others come again."""
    complete = [index for report in reports for index in report.complete]
    skipped = {index: reward for report in reports for index, reward in report.skipped.items()}
    assert len({*complete, *skipped}) == len(complete) + len(skipped), "a group was sampled twice"
    kept = sorted(sorted(complete, key=lambda index: (index not in awaited, index))[:groups])
    started = {*complete, *skipped}.union(*(report.started for report in reports))
    drawn = max(started, default=-1) + 1
    return Settlement(
        kept,
        skipped,
        deferred=sorted(started.difference(complete, skipped)),
        surplus=sorted({*complete}.difference(kept)),
        unasked=[index for index in range(drawn) if index not in started],
        drawn=drawn,
    )
