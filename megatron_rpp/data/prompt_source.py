"""Prompts, served in an order that a resumed run repeats, each exactly once an epoch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from megatron_rpp.data.prompt_order import PromptOrder
from megatron_rpp.experience.types import Prompt

_OPTIONS = {"seed": "run.seed", "curriculum": "data.curriculum", "sources": "the sizes and weights of data.sources"}


class Draw(NamedTuple):
    """A prompt whose turn it is."""

    position: int  # in the order of the whole run, from 0
    prompt: Prompt
    deferrals: int  # times that it has been put off


class PromptSource:
    """Deals out the run's prompts, `num_prompts` a step, each once an epoch of its source.

    A step either takes `next_batch`, or looks ahead with `peek` and says with `settle` what became of it: a
    position is used up, or put off and comes first in the next `peek`. The state is the first position that nobody
    has drawn, and those that were put off; so a resumed run gets what an uninterrupted one would get.

    Args:
        prompts: of data.train or of all data.sources.
        num_prompts: rollout.num_prompts.
        seed: run.seed.
        weights: of the sources, by name; without them each counts by its size.
        curriculum: data.curriculum.
        most_drawn: prompts that a step may draw, by the section `schedule`; at least num_prompts.

    Raises:
        ValueError: there are fewer prompts than a step may draw.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        num_prompts: int,
        seed: int,
        *,
        weights: Mapping[str, float] | None = None,
        curriculum: str = "none",
        most_drawn: int = 0,
    ) -> None:
        if num_prompts < 1 or num_prompts > len(prompts):
            raise ValueError(
                f"rollout.num_prompts={num_prompts} must be between 1 and the {len(prompts)} prompts of "
                "the training data; lower it or give more prompts"
            )
        if most_drawn > len(prompts):
            raise ValueError(
                f"a step may draw {most_drawn} prompts (schedule.over_sampling or schedule.max_draws, times "
                f"rollout.num_prompts={num_prompts}), more than the {len(prompts)} of the training data; lower one of "
                "them or give more prompts"
            )
        self.num_prompts = num_prompts
        self._order = PromptOrder(prompts, weights or {}, seed, curriculum)
        self._served = 0  # the first position that nobody has drawn
        self._deferred: dict[int, int] = {}  # position -> times that it was put off; all below _served

    def next_batch(self) -> list[Prompt]:
        """The next `num_prompts` prompts, used up; a batch may span two epochs."""
        draws = self.peek(self.num_prompts)
        self.settle([draw.position for draw in draws], ())
        return [draw.prompt for draw in draws]

    def peek(self, count: int) -> list[Draw]:
        """The next `count` prompts: those that were put off, oldest first, then fresh ones. Changes nothing."""
        return [Draw(p, self._order.at(p), self._deferred.get(p, 0)) for p in self._next_positions(count)]

    def settle(self, drawn: Sequence[int], deferred: Collection[int], unasked: Collection[int] = ()) -> None:
        """Uses up the positions `drawn`, a prefix of what `peek` gives, but for those `deferred`, which come again, and
        those `unasked`, which come again as if they had not been drawn: it does not count as putting them off.
        """
        assert list(drawn) == self._next_positions(len(drawn)), "a step settles what `peek` gave, from its first on"
        assert {*deferred, *unasked} <= set(drawn), "only what was drawn can be put off"
        for position in drawn:
            deferrals = self._deferred.pop(position, 0)
            if position in deferred or position in unasked:
                self._deferred[position] = deferrals + (position in deferred)
        self._served = max(self._served, max(drawn, default=-1) + 1)

    def _next_positions(self, count: int) -> list[int]:
        waiting = sorted(self._deferred)[:count]
        return [*waiting, *range(self._served, self._served + count - len(waiting))]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here, as JSON can hold it."""
        return {
            "served": self._served,
            "deferred": [list(item) for item in sorted(self._deferred.items())],
            **self._order.settings(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            ValueError: the saved run had other prompts, weights or curriculum, or another seed.
        """
        now = self._order.settings()
        saved = {key: value for key, value in state.items() if key not in ("served", "deferred")}
        for key in [*now, *saved]:
            if now.get(key) != saved.get(key):
                option = _OPTIONS.get(key, "the number of prompts of data.train")
                raise ValueError(
                    f"{option} is {now.get(key)}, but the checkpoint was written with {saved.get(key)}; "
                    "resume with the same data and seed, or start a new run.dir"
                )
        self._served = state["served"]
        self._deferred = {position: deferrals for position, deferrals in state.get("deferred", ())}
