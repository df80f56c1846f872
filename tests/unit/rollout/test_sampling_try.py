"""What several leaders make of one draw, whatever comes to an end when: no group twice, none lost, none too few."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import threading
from collections.abc import Collection
from typing import Any

import pytest
import torch.distributed as dist

from megatron_rpp.data.prompt_source import Draw
from megatron_rpp.experience.types import Prompt
from megatron_rpp.rollout.protocol import SamplingParams
from megatron_rpp.rollout.schedule.judge import Judge, RewardFailed
from megatron_rpp.rollout.schedule.quota import Quota
from megatron_rpp.rollout.schedule.sampling_try import Group, Patience, SamplingTry
from megatron_rpp.rollout.schedule.scheduler import Stopwatch, _start
from megatron_rpp.rollout.schedule.settlement import Report, settle
from megatron_rpp.rollout.schedule.step import Step
from megatron_rpp.rollout.schedule.tally import Tally

SAMPLING = SamplingParams(2, 8, 1.0, 1.0, (), seed=0)
KEPT, LEFT_OUT = [0.0, 1.0], [1.0, 1.0]


def random_step(chance: random.Random) -> Step:
    groups, is_judged = chance.randint(1, 8), chance.random() < 0.6
    at_once = math.ceil(chance.choice([1, 1.25, 2]) * groups)
    draws = max(at_once, chance.choice([1, 2, 4]) * groups) if is_judged else at_once
    times, tokens = chance.choice([0, 0, 0.02]), chance.choice([0, 0, 50])
    quota = Quota(groups, at_once, draws, 2, chance.randint(1, groups), times, tokens, is_judged)
    late = set(chance.sample(range(draws), min(chance.randint(0, groups), draws))) if chance.random() < 0.6 else set()
    return Step("0", [Draw(i, Prompt(i, "", (i,), ""), 2 * (i in late)) for i in range(draws)], quota, SAMPLING)


def run_leaders(step: Step, seed: int, count: int, chance_kept: float) -> tuple[list[SamplingTry], list[int]]:
    """(each leader's part, all indices that were sampled, as often as they were)."""
    store, sampled = dist.HashStore(), list[int]()
    queue = sorted(range(len(step.draws)), key=lambda i: (i not in step.awaited, i))
    most_open, parts = max(1, math.ceil(step.quota.at_once / count)), list[SamplingTry]()

    def lead(number: int) -> None:
        tally = Tally(store, "0/0", _start({}, step.awaited))
        parts.append(SamplingTry(step, tally, queue, most_open=most_open, poll_s=0.004))
        chance = random.Random(seed * 100 + number)

        async def sample(index: int) -> Group:
            sampled.append(index)
            await asyncio.sleep(chance.random() * 0.01)
            rewards = KEPT if chance.random() < chance_kept else LEFT_OUT
            rollout: Any = type("R", (), {"response_ids": (1,) * 5})
            return Group([rollout] * 2, rewards if step.quota.is_judged else None, 0.0)

        asyncio.run(parts[-1].run(sample, lambda counts: None))

    threads = [threading.Thread(target=lead, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads), f"seed {seed}: a leader waits for ever"
    return parts, sampled


def test_no_step_is_short_of_groups_while_prompts_are_left_and_none_that_is_awaited_is_put_off() -> None:
    for seed in range(120):
        chance = random.Random(seed)
        step, count = random_step(chance), chance.randint(1, 4)
        parts, sampled = run_leaders(step, seed, count, chance.choice([0.2, 0.5, 0.9]))
        quota, done = step.quota, [index for part in parts for index in part.done]
        assert len(set(sampled)) == len(sampled) and len(set(done)) == len(done), f"seed {seed}: sampled twice"
        kept = {index for part in parts for index, group in part.done.items() if group.is_kept}
        wanted = quota.least_groups if quota.time_s or quota.tokens else quota.groups
        assert len(kept) >= wanted or len(done) == quota.draws, f"seed {seed}: {len(kept)} groups of {wanted}"
        reports = [Report({i: 0.0 for i in part.done if i in kept}, {}, frozenset(part.started)) for part in parts]
        settlement = settle(reports, quota.groups, step.awaited)
        assert step.awaited <= set(done) and step.awaited & kept <= set(settlement.kept), f"seed {seed}"


def one_leader(groups: int, is_judged: bool = True) -> tuple[SamplingTry, Step]:
    return leader_of(Quota(groups, groups, groups, 2, 1, 0.0, 0, is_judged))


def leader_of(quota: Quota, late: Collection[int] = (), poll_s: float = 1.0) -> tuple[SamplingTry, Step]:
    """Alone; of its draw those `late` were put off too often already."""
    draws = [Draw(i, Prompt(i, "", (i,), ""), 2 * (i in late)) for i in range(quota.draws)]
    step = Step("0", draws, quota, SAMPLING)
    tally = Tally(dist.HashStore(), "0/0", _start({}, step.awaited))
    queue = sorted(range(quota.draws), key=lambda i: (i not in step.awaited, i))
    return SamplingTry(step, tally, queue, most_open=quota.draws, poll_s=poll_s), step


@pytest.mark.parametrize(
    ("groups", "budget", "complete"),
    [
        (5, {"tokens": 20}, [0, 1, 2]),
        (5, {"time_s": 0.05}, [0, 1, 2]),
        (3, {"tokens": 20}, [0, 1, 2]),
        (3, {}, [0, 1, 2, 3, 4, 5]),
    ],
    ids=["tokens", "time", "tokens with enough groups", "groups"],
)
def test_only_a_step_that_has_enough_groups_lets_others_run_while_it_waits(
    groups: int, budget: dict[str, Any], complete: list[int]
) -> None:
    """A budget that is spent is spent: nothing but what must be awaited may go on."""
    settings = {"at_once": 6, "draws": 6, "max_deferrals": 2, "least_groups": 2, "time_s": 0.0, "tokens": 0}
    part, _ = leader_of(Quota(groups, **settings | budget), late=[0], poll_s=0.01)

    async def run() -> None:
        others_end = asyncio.Event()

        async def sample(index: int) -> Group:
            if index == 0:  # put off too often, and longer than the others
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(others_end.wait(), 2.0)
                await asyncio.sleep(0.1)
            elif index > 2:
                await asyncio.sleep(0.6)
                others_end.set()
            rollout: Any = type("R", (), {"response_ids": (1,) * 5})
            return Group([rollout] * 2, None, 0.0)

        await part.run(sample, lambda counts: None)

    asyncio.run(run())
    assert sorted(part.done) == complete and part.aborted == 6 - len(complete)


def test_what_ends_just_after_the_awaited_groups_is_not_put_off_and_nothing_else_has_a_grace() -> None:
    """At a limit of tokens all end almost at once, and the awaited first, since they were started first."""
    now = [100.0]
    waiting, at_once = Patience(lambda: now[0]), Patience(lambda: now[0])
    for now[0], awaited, is_over in ((110.0, 2, False), (120.0, 1, False), (130.0, 0, False), (132.9, 0, False)):
        assert waiting.is_over(awaited) == is_over
    now[0] = 133.0
    assert waiting.is_over(0), "a tenth of the 30 s that the awaited groups took"
    assert at_once.is_over(0)


def test_what_is_complete_at_the_moment_of_an_error_is_not_lost_and_the_rewards_error_comes_first() -> None:
    part, _ = one_leader(8)

    async def run() -> None:
        moment = asyncio.Event()

        async def sample(index: int) -> Group:
            if index == 7:
                moment.set()
            await moment.wait()
            if index == 2:
                raise OSError("the server")
            if index == 5:
                raise RewardFailed(ValueError("the verifier"))
            return Group([], KEPT, 0.0)

        await part.run(sample, lambda counts: None)

    with pytest.raises(RewardFailed, match="the verifier"):
        asyncio.run(run())
    assert sorted(part.done) == [0, 1, 3, 4, 6, 7]


def test_a_reward_that_returns_too_few_numbers_fails_and_does_not_hang() -> None:
    async def run() -> None:
        judge = Judge(lambda rollouts: [0.0])  # type: ignore[arg-type]
        with pytest.raises(RewardFailed, match="1 rewards for 2 responses"):
            await asyncio.wait_for(judge([None, None]), 5)  # type: ignore[list-item]
        await judge.close()

    asyncio.run(run())


def test_a_stopwatch_counts_time_once_however_many_run_and_none_while_nobody_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("megatron_rpp.rollout.schedule.scheduler.time.monotonic", lambda: now[0])
    watch = Stopwatch()
    with watch:
        now[0] = 2.0
        with watch:
            now[0] = 3.0
        assert watch.elapsed_s() == 3.0
        now[0] = 4.0
    now[0] = 100.0
    assert watch.elapsed_s() == 4.0
    with watch:
        now[0] = 101.0
        assert watch.elapsed_s() == 5.0
