"""Which prompts a run is served, one source or a mix: each exactly once an epoch, whatever is put off and resumed."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rpp.data.prompt_source import PromptSource
from megatron_rpp.experience.types import Prompt


def prompts(sizes: dict[str, int]) -> list[Prompt]:
    """Ids in the order of the sources; the pass rate falls as the id grows, within a source in steps of two."""
    named = [(name, i) for name, size in sizes.items() for i in range(size)]
    return [
        Prompt(id=n, text=f"{name}{i}", token_ids=(1,), answer="", source=name, pass_rate=1 - (i // 2) / 100)
        for n, (name, i) in enumerate(named)
    ]


def source(sizes: dict[str, int], num_prompts: int = 2, **settings: Any) -> PromptSource:
    return PromptSource(prompts(sizes), num_prompts, settings.pop("seed", 3), **settings)


def served(prompt_source: PromptSource, count: int) -> list[Prompt]:
    draws = prompt_source.peek(count)
    prompt_source.settle([draw.position for draw in draws], ())
    return [draw.prompt for draw in draws]


def resumed(old: PromptSource, new: PromptSource) -> PromptSource:
    new.load_state_dict(json.loads(json.dumps(old.state_dict())))
    return new


def test_one_source_is_served_in_the_order_that_checkpoints_before_the_mixing_had() -> None:
    order = list(range(10))
    random.Random("3/0").shuffle(order)
    old = source({"": 10})
    assert [p.id for p in served(old, 4)] == order[:4]
    new = source({"": 10})
    new.load_state_dict({"served": 4, "seed": 3, "size": 10})
    assert [p.id for p in new.next_batch()] == order[4:6]


MIXES = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 7), min_size=1, max_size=3)
STEPS = st.lists(
    st.tuples(
        st.integers(0, 9),  # looked at
        st.integers(0, 9),  # of these settled
        st.sets(st.integers(0, 8)),  # of these put off, by their place
        st.booleans(),  # saved and resumed
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(sizes=MIXES, weights=st.lists(st.integers(1, 5), min_size=3, max_size=3) | st.none(), steps=STEPS)
def test_each_prompt_is_used_once_an_epoch_whatever_is_put_off_and_resumed(
    sizes: dict[str, int], weights: list[int] | None, steps: list[tuple[int, int, set[int], bool]]
) -> None:
    options: dict[str, Any] = {"weights": dict(zip("abc", map(float, weights), strict=True)) if weights else {}}
    prompt_source = source(sizes, 1, **options)
    used: dict[int, Prompt] = {}
    for looked_at, settled, put_off, is_resumed in steps:
        draws = prompt_source.peek(looked_at)
        assert draws == prompt_source.peek(looked_at), "looking changes nothing"
        draws = draws[:settled]
        later = [draw.position for i, draw in enumerate(draws) if i in put_off]
        prompt_source.settle([draw.position for draw in draws], later)
        for draw in draws:
            if draw.position not in later:
                assert draw.position not in used
                used[draw.position] = draw.prompt
        if is_resumed:
            prompt_source = resumed(prompt_source, source(sizes, 1, **options))
    while draws := [draw for draw in prompt_source.peek(1) if draw.deferrals]:
        used |= {draw.position: draw.prompt for draw in draws}
        prompt_source.settle([draw.position for draw in draws], ())
    assert sorted(used) == list(range(len(used)))
    for name, size in sizes.items():
        own = [used[position].id for position in sorted(used) if used[position].source == name]
        epochs = [own[i : i + size] for i in range(0, len(own), size)]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs), "a prompt came twice in an epoch"
        assert [used[p] for p in sorted(used) if used[p].source == name] == served_alone(name, sizes, len(own))


def served_alone(name: str, sizes: dict[str, int], count: int) -> list[Prompt]:
    """What the source `name` gives by itself: mixing does not change the order within a source."""
    alone = PromptSource([p for p in prompts(sizes) if p.source == name], 1, 3)
    return served(alone, count)


def test_what_was_put_off_comes_first_oldest_first_and_counts_how_often() -> None:
    prompt_source = source({"": 10})
    first = prompt_source.peek(4)
    prompt_source.settle([0, 1, 2, 3], {1, 3})
    again = resumed(prompt_source, source({"": 10})).peek(3)
    assert [(draw.position, draw.deferrals) for draw in again] == [(1, 1), (3, 1), (4, 0)]
    assert again[0].prompt == first[1].prompt and again[1].prompt == first[3].prompt
    prompt_source.settle([1, 3, 4], [3])
    assert [(draw.position, draw.deferrals) for draw in prompt_source.peek(2)] == [(3, 2), (5, 0)]


def test_what_no_server_was_asked_for_comes_again_as_often_put_off_as_before() -> None:
    prompt_source = source({"": 10})
    prompt_source.settle([0, 1, 2, 3], {1}, {2})
    prompt_source.settle([1, 2], {2}, {1})
    again = resumed(prompt_source, source({"": 10})).peek(3)
    assert [(draw.position, draw.deferrals) for draw in again] == [(1, 1), (2, 1), (4, 0)]


def test_a_run_that_no_longer_puts_off_still_serves_what_was_put_off() -> None:
    prompt_source = source({"": 10})
    late = prompt_source.peek(2)[1].prompt
    prompt_source.settle([0, 1], [1])
    assert prompt_source.next_batch()[0] == late


def test_without_weights_sources_count_by_size_and_all_epochs_end_together() -> None:
    prompt_source = source({"a": 9, "b": 3, "c": 1})
    for _ in range(3):
        epoch = [p.id for p in served(prompt_source, 13)]
        assert sorted(epoch) == list(range(13))


def test_shares_follow_the_weights_in_every_stretch() -> None:
    mixed = served(source({"a": 50, "b": 5}, weights={"a": 1.0, "b": 3.0}), 400)
    assert Counter(p.source for p in mixed) == {"a": 100, "b": 300}
    for start in range(0, 380):
        assert 13 <= sum(p.source == "b" for p in mixed[start : start + 20]) <= 17
    of_b = Counter(p.id for p in mixed if p.source == "b")
    assert set(of_b.values()) == {60}, "each of b's prompts once in each of its epochs"


def test_easy_prompts_come_first_in_every_epoch_and_only_equal_ones_are_shuffled() -> None:
    prompt_source = source({"": 40}, curriculum="easy_first")
    first, second = served(prompt_source, 40), served(prompt_source, 40)
    rates = [1 - (i // 2) / 100 for i in range(40)]
    assert [p.pass_rate for p in first] == [p.pass_rate for p in second] == rates
    assert [p.id for p in first] != [p.id for p in second] and {p.id for p in first} == set(range(40))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"weights": {"a": 2.0, "b": 1.0}}, "sizes and weights of data.sources is"),
        ({"curriculum": "easy_first"}, "data.curriculum is easy_first, but the checkpoint was written with None"),
        ({"seed": 4}, "run.seed is 4, but the checkpoint was written with 3"),
    ],
)
def test_a_run_resumed_with_another_mix_is_refused(other: dict[str, Any], message: str) -> None:
    state = source({"a": 4, "b": 4}, weights={"a": 1.0, "b": 1.0}).state_dict()
    with pytest.raises(ValueError, match=message):
        source({"a": 4, "b": 4}, **{"weights": {"a": 1.0, "b": 1.0}, **other}).load_state_dict(state)
    with pytest.raises(ValueError, match="is None, but the checkpoint was written with"):
        source({"": 8}).load_state_dict(state)


def test_a_mix_written_in_another_order_is_served_the_same() -> None:
    def names(sizes: dict[str, int]) -> list[tuple[str, int]]:
        first = {name: min(p.id for p in prompts(sizes) if p.source == name) for name in sizes}
        return [(p.source, p.id - first[p.source]) for p in served(source(sizes), 16)]

    assert names({"a": 4, "b": 4}) == names({"b": 4, "a": 4})


def test_settling_what_was_not_drawn_is_our_error() -> None:
    with pytest.raises(AssertionError):
        source({"": 10}).settle([1, 2], ())
    with pytest.raises(AssertionError):
        source({"": 10}).settle([0, 1], [2])


def test_a_step_that_may_draw_more_prompts_than_there_are_is_refused() -> None:
    source({"": 8}, most_drawn=8)
    message = r"a step may draw 9 prompts \(schedule.over_sampling or schedule.max_draws, .* more than the 8 of"
    with pytest.raises(ValueError, match=message):
        source({"": 8}, most_drawn=9)
