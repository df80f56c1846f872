"""A scheduled step: who is sampled, aborted, left out and put off, by one leader and by two."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from fake_sglang import FakeServer, running, samples_of
from scheduled_steps import FakeReward, Job, hang_for, kept_ids, prompts, quota

from megatron_rpp.data.prompt_source import PromptSource
from megatron_rpp.rollout.protocol import RolloutError

MIXED, RIGHT, WRONG = (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running() as fake:
        yield fake


def source(number: int = 40, per_step: int = 4) -> PromptSource:
    return PromptSource(prompts(number), per_step, seed=0)


def first_ids(of: PromptSource, number: int) -> list[int]:
    return [draw.prompt.id for draw in of.peek(number)]


def waiting(of: PromptSource) -> dict[int, int]:
    """Prompts that were put off -> how often."""
    return {draw.prompt.id: draw.deferrals for draw in of.peek(20) if draw.deferrals}


@pytest.mark.parametrize("leaders", [1, 2])
def test_oversampling_aborts_the_tail_and_trains_on_the_first_to_be_complete(server: FakeServer, leaders: int) -> None:
    prompts_ = source()
    slow = set(first_ids(prompts_, 6)[1:3])
    hang_for(server, slow.__contains__)
    start = time.monotonic()
    draws, settlement = Job([server], leaders).step(prompts_, quota(4, at_once=6))
    assert time.monotonic() - start < 5, "it waited for the tail"
    kept = kept_ids(draws, settlement)
    assert len(kept) == 4 and not slow & set(kept)
    aborted = {p["input_ids"][0][0] for p in server.payloads if server.is_aborted(p)}
    assert aborted == slow == set(waiting(prompts_)), "they must not go on sampling, and come again"


def test_what_was_put_off_is_asked_first_and_awaited_once_it_was_put_off_too_often(server: FakeServer) -> None:
    prompts_, job = source(), Job([server], 2)
    slow = first_ids(prompts_, 6)[2]
    hang_for(server, lambda i: i == slow, seconds=1.0)
    for deferrals in (1, 2):
        _, settlement = job.step(prompts_, quota(4, at_once=6))
        assert waiting(prompts_)[slow] == deferrals
        server.payloads.clear()
    draws, settlement = Job([server], max_concurrent_requests=2).step(prompts_, quota(4, at_once=6))
    assert slow in kept_ids(draws, settlement) and slow not in waiting(prompts_)
    first = {payload["input_ids"][0][0] for payload in server.payloads[:2]}
    assert slow in first, "it is asked for before all others"
    assert len(settlement.kept) == 4, "while it is awaited its place is kept, and no other group sampled in vain"


@pytest.mark.parametrize("leaders", [1, 2])
def test_while_a_step_waits_for_a_group_another_that_was_put_off_may_end_and_is_kept(
    server: FakeServer, leaders: int
) -> None:
    """Aborted as soon as enough were complete, it would be the next step's to wait for, and so on for ever."""
    prompts_, ended = source(), list[int]()
    oldest, younger, endless = first_ids(prompts_, 6)[:3]
    prompts_.settle([0], {0})
    prompts_.settle([0, 1], {0, 1})

    def answer(path: str, payload: dict[str, Any]) -> tuple[int, object]:
        prompt = payload["input_ids"][0][0]
        after = {younger: 4, oldest: 5, endless: 99}.get(prompt, 0)  # so many others have ended
        end = time.monotonic() + 10
        while len(ended) < after and time.monotonic() < end and not server.is_aborted(payload):
            time.sleep(0.01)
        time.sleep(0.4 if after else 0.0)  # a leader would have had the time to abort it
        if not server.is_aborted(payload):
            ended.append(prompt)
        return 200, samples_of(payload)

    server.answer = answer
    draws, settlement = Job([server], leaders).step(prompts_, quota(4, at_once=7))
    assert {oldest, younger} <= set(kept_ids(draws, settlement)) and len(settlement.kept) == 4
    assert ended[-1] == oldest and endless in waiting(prompts_), "then what still runs is aborted"


def test_no_more_groups_are_awaited_than_a_step_trains_on(server: FakeServer) -> None:
    _, settlement = Job([server]).step(source(), quota(4, at_once=12, max_deferrals=0))
    assert settlement.kept == [0, 1, 2, 3] and len(settlement.deferred) == settlement.drawn - 4


@pytest.mark.parametrize("leaders", [1, 2])
def test_dynamic_sampling_leaves_equal_rewards_out_and_draws_others(server: FakeServer, leaders: int) -> None:
    prompts_ = source()
    useless = {i: (RIGHT if place % 2 else WRONG) for place, i in enumerate(first_ids(prompts_, 6)) if place < 5}
    reward = FakeReward(lambda i: useless.get(i, MIXED))
    draws, settlement = Job([server], leaders).step(prompts_, quota(4, draws=16), reward)
    assert {draws[i].prompt.id: reward for i, reward in settlement.skipped.items()} == {
        i: rewards[0] for i, rewards in useless.items()
    }
    assert len(settlement.kept) == 4 and not set(kept_ids(draws, settlement)) & set(useless)
    assert settlement.drawn == 9 and not settlement.deferred, "as many are drawn anew as were left out, and no more"
    assert sum(reward.calls) == 2 * 9, "every response is judged once"


def test_dynamic_sampling_goes_on_with_what_it_has_after_its_last_draw(server: FakeServer) -> None:
    prompts_ = source()
    good = set(first_ids(prompts_, 10)[8:])
    draws, settlement = Job([server]).step(
        prompts_, quota(4, draws=10), FakeReward(lambda i: MIXED if i in good else WRONG)
    )
    assert set(kept_ids(draws, settlement)) == good and settlement.drawn == 10 and len(settlement.skipped) == 8


def test_an_awaited_group_that_is_left_out_is_replaced(server: FakeServer) -> None:
    """Its place was kept for it, so that others were aborted or not begun."""
    prompts_, job = source(), Job([server], 2)
    useless = first_ids(prompts_, 4)[0]
    prompts_.settle([0], [0])
    hang_for(server, lambda i: i == useless, seconds=1.0)
    reward = FakeReward(lambda i: WRONG if i == useless else MIXED)
    draws, settlement = job.step(prompts_, quota(4, draws=16, max_deferrals=1), reward)
    assert len(settlement.kept) == 4 and [draws[i].prompt.id for i in settlement.skipped] == [useless]


def test_judging_does_not_hold_sampling_up_and_no_two_threads_judge(server: FakeServer) -> None:
    reward = FakeReward(lambda i: MIXED, takes_s=0.3)
    Job([server]).step(source(per_step=20), quota(20), reward)
    assert len(reward.calls) < 10, "groups that wait for the judge are judged together"
    assert sum(reward.calls) == 40 and reward.most_at_once == 1


def test_waiting_for_the_judge_does_not_count_as_sampling_that_takes_too_long(server: FakeServer) -> None:
    job = Job([server], 1, request_deadline_s=0.8, max_retries=0)
    _, settlement = job.step(source(), quota(4), FakeReward(lambda i: MIXED, takes_s=1.0))
    assert len(settlement.kept) == 4 and job.tries == 1


def test_an_error_of_the_reward_is_raised_as_it_is_and_sampling_is_not_repeated(server: FakeServer) -> None:

    def fail(prompt: int) -> tuple[float, float]:
        raise LookupError("no such verifier")

    job = Job([server], 2, max_retries=3)
    with pytest.raises(LookupError, match="no such verifier"):
        job.step(source(), quota(4), FakeReward(fail))
    assert job.tries == 1


def test_an_error_of_the_reward_that_no_other_rank_could_be_sent_is_told_in_words(server: FakeServer) -> None:
    class Local(Exception): ...  # cannot be pickled

    def fail(prompt: int) -> tuple[float, float]:
        raise Local("no such verifier")

    with pytest.raises(RuntimeError, match="Local: no such verifier"):
        Job([server]).step(source(), quota(4), FakeReward(fail))


def test_the_time_budget_ends_a_step_but_not_before_it_has_a_train_batch(server: FakeServer) -> None:
    prompts_ = source()
    slow = set(first_ids(prompts_, 8)[2:])
    hang_for(server, slow.__contains__, seconds=1.5)
    draws, settlement = Job([server], 2).step(prompts_, quota(8, time_s=0.3, least_groups=2))
    assert set(waiting(prompts_)) == slow, "all that had not ended by then is put off"
    assert {p["input_ids"][0][0] for p in server.payloads if server.is_aborted(p)} == slow
    assert set(kept_ids(draws, settlement)) == set(first_ids(source(), 2))
    draws, settlement = Job([server]).step(prompts_, quota(8, time_s=0.3, least_groups=4))
    assert len(settlement.kept) >= 4


def test_the_token_budget_ends_a_step(server: FakeServer) -> None:
    """Each response of the stand-in has two tokens, each group two responses."""
    job = Job([server], 1, max_concurrent_requests=1)
    _, settlement = job.step(source(per_step=8), quota(8, tokens=12))
    assert len(settlement.kept) == 3
    _, settlement = job.step(source(per_step=8), quota(8, tokens=12, least_groups=5))
    assert len(settlement.kept) == 5


def test_of_groups_at_once_the_token_budget_counts_those_that_have_ended(server: FakeServer) -> None:
    """Eight at once of four tokens each: three end, one after the other, and those that go on are aborted."""
    prompts_ = source(per_step=8)
    order = first_ids(prompts_, 8)
    hang_for(server, lambda i: server.most_in_flight < 8 or order.index(i) >= 3)
    draws, settlement = Job([server]).step(prompts_, quota(8, tokens=12))
    assert set(kept_ids(draws, settlement)) == set(order[:3]) and server.most_in_flight == 8
    assert (
        {p["input_ids"][0][0] for p in server.payloads if server.is_aborted(p)}
        == set(order[3:])
        == set(waiting(prompts_))
    )


def test_leaders_share_the_queue_as_they_are_free(server: FakeServer) -> None:
    job = Job([server], 2, max_concurrent_requests=4)
    _, settlement = job.step(source(per_step=30), quota(30))
    assert settlement.kept == list(range(30)) and settlement.deferred == []
    first, second = (set(scheduler.done) for scheduler in job.schedulers)
    assert first and second and not first & second


def test_what_is_complete_when_another_leader_fails_is_not_sampled_again(server: FakeServer) -> None:
    answer, has_failed = server.answer, []

    def wrong_count_once(path: str, payload: dict[str, list[list[int]]]) -> tuple[int, object]:
        status, samples = answer(path, payload)
        if payload["input_ids"][0][0] == doomed and not has_failed:
            time.sleep(0.3)  # the others are complete by then
            has_failed.append(True)
            return status, samples[:1]
        return status, samples

    prompts_, server.answer = source(per_step=8), wrong_count_once
    doomed = first_ids(prompts_, 8)[5]
    job = Job([server], 2, max_retries=1)
    draws, settlement = job.step(prompts_, quota(8))
    assert job.tries == 2 and settlement.kept == list(range(8)) and not settlement.deferred
    asked = [payload["input_ids"][0][0] for payload in server.payloads]
    assert sorted(asked) == sorted([*(draw.prompt.id for draw in draws), doomed])


def test_a_leader_that_fails_does_not_leave_the_others_waiting(server: FakeServer) -> None:
    prompts_ = source()
    doomed, slow, *_ = first_ids(prompts_, 4)
    hang_for(server, slow.__eq__, seconds=20.0)
    answer = server.answer
    server.answer = lambda path, p: (400, "no") if p["input_ids"][0][0] == doomed else answer(path, p)
    start = time.monotonic()
    with pytest.raises(RolloutError, match="400: no"):
        Job([server], 2, max_retries=0).step(prompts_, quota(4))
    assert time.monotonic() - start < 5


def test_past_the_deadline_the_error_names_the_keys(server: FakeServer) -> None:
    hang_for(server, lambda i: True, seconds=5.0)
    with pytest.raises(RolloutError, match=r"0 of 4 groups after rollout\.request_deadline_s=0\.5.*time_budget_s"):
        Job([server], 1, request_deadline_s=0.5, max_retries=0).step(source(), quota(4))


def test_the_counters_of_a_step_leave_the_store(server: FakeServer) -> None:
    prompts_, job = source(), Job([server], 2)
    job.step(prompts_, quota(4, at_once=6))
    before = job.stores[0].num_keys()
    for _ in range(3):
        job.step(prompts_, quota(4, at_once=6))
    assert job.stores[0].num_keys() == before
