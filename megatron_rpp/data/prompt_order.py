"""Which prompt stands at each position of a run, counted from its first. Pure: a position always gives the same one."""

from __future__ import annotations

import heapq
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_rpp.experience.types import Prompt

_EPOCHS_KEPT = 2  # prompts that were put off may be of the epoch before


class SourceOrder:
    """The prompts of one source: each once an epoch, in an order that the seed, the name and the epoch decide."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, name: str, curriculum: str) -> None:
        self._prompts = prompts
        self._key = f"{seed}/{name}" if name else f"{seed}"
        self._easy_first = curriculum == "easy_first"
        self._orders: dict[int, list[int]] = {}

    def at(self, index: int) -> Prompt:
        """The prompt that is served `index`-th of this source, over all epochs."""
        epoch, offset = divmod(index, len(self._prompts))
        if epoch not in self._orders:
            while len(self._orders) >= _EPOCHS_KEPT:
                del self._orders[min(self._orders)]
            self._orders[epoch] = self._order(epoch)
        return self._prompts[self._orders[epoch][offset]]

    def _order(self, epoch: int) -> list[int]:
        """Shuffled; with the curriculum easy_first, by falling pass rate, and only equal ones are shuffled."""
        order = list(range(len(self._prompts)))
        random.Random(f"{self._key}/{epoch}").shuffle(order)
        if self._easy_first:
            order.sort(key=lambda i: -self._pass_rate(i))
        return order

    def _pass_rate(self, i: int) -> float:
        rate = self._prompts[i].pass_rate
        assert rate is not None, "load_prompts reads the pass rates that a curriculum needs"
        return rate


class PromptOrder:
    """The prompts of one or several sources, told apart by Prompt.source, in one sequence without end.

    Args:
        prompts: of all sources.
        weights: of each source, by name; their shares in any stretch of positions are off by less than a few
            prompts. Without weights a source counts by its size, so that all epochs end together.
        seed: run.seed.
        curriculum: none or easy_first, within each source.
    """

    def __init__(self, prompts: Sequence[Prompt], weights: Mapping[str, float], seed: int, curriculum: str) -> None:
        # By name, so that a resumed run may write its sources in another order.
        by_source: dict[str, list[Prompt]] = {name: [] for name in sorted({prompt.source for prompt in prompts})}
        for prompt in prompts:
            by_source[prompt.source].append(prompt)
        self._sources = [SourceOrder(p, seed, name, curriculum) for name, p in by_source.items()]
        self._weights = [weights.get(name) or float(len(p)) for name, p in by_source.items()]
        self._turns = array("q")  # at each position so far, index in the source x number of sources + source
        self._merged = _merge(self._weights)
        self._settings: dict[str, Any] = {"seed": seed, "size": len(prompts)}
        if curriculum != "none":
            self._settings["curriculum"] = curriculum
        if set(by_source) != {""}:
            shares = zip(by_source.items(), self._weights, strict=True)
            self._settings["sources"] = {name: [len(p), weight] for (name, p), weight in shares}

    def __len__(self) -> int:
        return int(self._settings["size"])

    def at(self, position: int) -> Prompt:
        """The prompt at `position`."""
        if len(self._sources) == 1:
            return self._sources[0].at(position)
        while len(self._turns) <= position:
            source, index = next(self._merged)
            self._turns.append(index * len(self._sources) + source)
        index, source = divmod(self._turns[position], len(self._sources))
        return self._sources[source].at(index)

    def settings(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be served the same prompts."""
        return dict(self._settings)


def _merge(weights: Sequence[float]) -> Iterator[tuple[int, int]]:
    """(source, index in it) without end: source s's j-th turn comes at the time (j + 1/2) / weight of s."""
    heap = [(0.5 / weight, source, 0) for source, weight in enumerate(weights)]
    heapq.heapify(heap)
    while True:
        _, source, index = heap[0]
        yield source, index
        heapq.heapreplace(heap, ((index + 1.5) / weights[source], source, index + 1))
