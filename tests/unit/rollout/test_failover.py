"""Sampling goes on where a server dies, falls silent, fails, or answers from other weights."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fake_sglang import STOP, FakeServer, Reply, running, samples_of

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.experience.types import Prompt, Rollout
from megatron_rpp.rollout.payloads import generate_payloads
from megatron_rpp.rollout.protocol import RolloutError, SamplingParams
from megatron_rpp.rollout.replies import version_spans
from megatron_rpp.rollout.server_pool import ServerLost, ServerPool, Work
from megatron_rpp.rollout.sglang_client import SGLangClient

PROMPTS = [Prompt(id=i, text="", token_ids=(i, 7), answer="") for i in range(20)]
SAMPLING = SamplingParams(2, 16, 1.0, 1.0, (STOP,), seed=0)


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    with running() as first, running() as second:
        yield [first, second]


def client(servers: list[FakeServer], **rollout: Any) -> SGLangClient:
    return SGLangClient([s.url for s in servers], RolloutConfig(**rollout), decode=lambda ids: "")


def slowly(path: str, payload: dict[str, Any]) -> Reply:
    time.sleep(0.1)
    return 200, samples_of(payload)


def is_complete(rollouts: list[Rollout]) -> bool:
    """Every prompt's samples, in order, none missing and none twice."""
    return [(r.prompt.id, r.response_ids) for r in rollouts] == [(i, (i, STOP)) for i in range(20) for _ in range(2)]


def test_requests_of_a_server_that_falls_silent_go_to_the_other(servers: list[FakeServer]) -> None:
    silent = servers[0]
    silent.stopped.set()
    c = client(servers, health_deadline_s=2.0, max_retries=0)
    start = time.monotonic()
    assert is_complete(c.generate(PROMPTS, SAMPLING))
    assert time.monotonic() - start > 1.9
    assert len(silent.payloads) == 10, "it should have held half of the requests"
    assert c.suspects == {silent.url}


def test_a_server_that_is_only_slow_is_not_taken_for_silent(servers: list[FakeServer]) -> None:
    def very_slow(path: str, payload: dict[str, Any]) -> Reply:
        time.sleep(3.0)
        return 200, samples_of(payload)

    servers[0].answer = very_slow
    c = client(servers, health_deadline_s=1.5, max_retries=0)
    assert is_complete(c.generate(PROMPTS, SAMPLING))
    assert c.suspects == set() and len(servers[0].payloads) == 10 and len(servers[0].probes) > 1


def test_probes_while_sampling_do_not_make_the_server_sample(servers: list[FakeServer]) -> None:
    """/health generates a greedy token on an idle server, which changes what the seeds of its neighbours give."""
    servers[0].answer = slowly
    client(servers).generate(PROMPTS, SAMPLING)
    assert set(servers[0].probes) == {"/server_info"}


def test_a_server_whose_health_check_fails_is_given_up_like_a_silent_one(servers: list[FakeServer]) -> None:
    sick, _ = servers
    sick.status = 503
    sick.answer = lambda path, payload: (sick.end.wait(30), (500, ""))[1]
    c = client(servers, health_deadline_s=1.5, max_retries=0)
    assert is_complete(c.generate(PROMPTS, SAMPLING)) and c.suspects == {sick.url}


def test_a_server_that_dies_in_the_middle_costs_no_retry(servers: list[FakeServer]) -> None:
    dying, alive = servers
    alive.answer = slowly

    def die(path: str, payload: dict[str, Any]) -> Reply:
        dying.server_close()
        raise ConnectionAbortedError  # closes this connection without a reply

    dying.answer = die
    c = client(servers, max_concurrent_requests=4, max_retries=0)
    assert is_complete(c.generate(PROMPTS, SAMPLING))
    assert c.suspects == {dying.url} and len(dying.payloads) <= 4


@pytest.mark.parametrize("version", ["2", "default"])
def test_a_server_of_another_version_is_asked_once_and_its_samples_come_from_elsewhere(
    servers: list[FakeServer], version: str
) -> None:
    stale, good = servers
    stale.answer = lambda path, payload: (200, samples_of(payload, weight_version=version))
    good.answer = slowly
    c = client(servers, max_concurrent_requests=2, max_retries=0)
    c.version = 3
    rollouts = c.generate(PROMPTS, SAMPLING)
    assert is_complete(rollouts) and {r.policy_version for r in rollouts} == {3}
    assert len(stale.payloads) == 1 and c.suspects == {stale.url}


def test_a_sample_that_began_under_an_older_version_is_refused(servers: list[FakeServer]) -> None:
    spans = [{"version": "2", "start": 0, "end": 1}, {"version": "3", "start": 1, "end": 2}]
    servers[0].answer = lambda path, payload: (200, samples_of(payload, weight_versions=spans))
    c = client(servers[:1])
    c.version = 3
    with pytest.raises(RolloutError, match=rf"no SGLang server is left.*{servers[0].url}: .*version 2, not 3"):
        c.generate(PROMPTS, SAMPLING)
    c.version = None
    assert {tuple(r.version_spans) for r in c.generate(PROMPTS, SAMPLING)} == {((2, 0, 1), (3, 1, 2))}


def test_a_reply_without_spans_is_one_span() -> None:
    meta = samples_of({"input_ids": [[5]]})[0]["meta_info"]
    assert version_spans(meta) == ((3, 0, 2),)


def test_with_no_server_left_the_error_comes_at_once_and_names_each(servers: list[FakeServer]) -> None:
    stale, dead = servers
    stale.answer = lambda path, payload: (200, samples_of(payload, weight_version="2"))
    dead.server_close()
    c = client(servers, request_deadline_s=30)
    c.version = 3
    start = time.monotonic()
    with pytest.raises(RolloutError, match="no SGLang server is left") as raised:
        c.generate(PROMPTS, SAMPLING)
    assert time.monotonic() - start < 5
    assert f"{stale.url}: samples from version 2, not 3" in str(raised.value)
    assert f"{dead.url}: Cannot connect" in str(raised.value)
    assert c.suspects == {stale.url, dead.url}


def test_a_server_that_fails_every_request_does_not_lose_a_prompt(servers: list[FakeServer]) -> None:
    servers[0].answer = lambda path, payload: (500, "out of memory")
    assert is_complete(client(servers, max_retries=0).generate(PROMPTS, SAMPLING))


def test_suspects_are_those_of_the_last_call(servers: list[FakeServer]) -> None:
    replies = iter([(200, samples_of({"input_ids": [[0, 7]] * 2}, weight_version="2"))])
    servers[0].answer = lambda path, payload: next(replies, (200, samples_of(payload)))
    c = client(servers)
    c.version = 3
    c.generate(PROMPTS[:1], SAMPLING)
    assert c.suspects == {servers[0].url}
    c.generate(PROMPTS[:1], SAMPLING)
    assert c.suspects == set()


def test_the_faster_server_gets_more_requests(servers: list[FakeServer]) -> None:
    slow, fast = servers
    ten_are_done = threading.Event()
    asked_of_slow: list[int] = []  # requests, when the fast one got its tenth

    def answer_once_ten_are_done(path: str, payload: dict[str, Any]) -> Reply:
        ten_are_done.wait(5)
        return 200, samples_of(payload)

    def answer(path: str, payload: dict[str, Any]) -> Reply:
        if len(fast.payloads) >= 10 and not ten_are_done.is_set():
            asked_of_slow.append(len(slow.payloads))
            ten_are_done.set()
        return 200, samples_of(payload)

    slow.answer, fast.answer = answer_once_ten_are_done, answer
    assert is_complete(client(servers, max_concurrent_requests=2).generate(PROMPTS, SAMPLING))
    assert asked_of_slow and asked_of_slow[0] <= 1


def test_no_default_of_the_server_can_change_the_distribution(servers: list[FakeServer]) -> None:
    client(servers).generate(PROMPTS[:1], SAMPLING)
    params = (servers[0].payloads + servers[1].payloads)[0]["sampling_params"][0]
    assert params["top_k"] == -1 and params["min_p"] == 0 and params["repetition_penalty"] == 1
    assert params["frequency_penalty"] == params["presence_penalty"] == params["min_new_tokens"] == 0
    assert params["logit_bias"] is None and params["custom_params"] is None and params["ignore_eos"] is False


def test_no_request_is_left_running_when_a_call_fails(servers: list[FakeServer]) -> None:
    hung = threading.Event()

    def answer(path: str, payload: dict[str, Any]) -> Reply:
        if payload["input_ids"][0][0] == 0:
            return 400, "bad request"
        hung.wait(30)
        return 200, samples_of(payload)

    servers[0].answer = answer
    start = time.monotonic()
    with pytest.raises(RolloutError, match="400: bad request"):
        client(servers[:1]).generate(PROMPTS, SAMPLING)
    assert time.monotonic() - start < 5
    hung.set()


def test_a_request_that_waits_to_be_sent_again_does_not_go_to_a_server_that_was_given_up_meanwhile(
    servers: list[FakeServer],
) -> None:
    """The server fails it, then falls silent while it waits: with nobody left, the call ends there."""
    silent = servers[0]

    def fail_and_fall_silent(path: str, payload: dict[str, Any]) -> Reply:
        threading.Timer(0.05, silent.stopped.set).start()
        return 500, "out of memory"

    silent.answer = fail_and_fall_silent
    c = client(servers[:1], health_deadline_s=0.1, request_deadline_s=20, max_retries=30)
    with pytest.raises(RolloutError, match=r"no SGLang server is left.*no sign of life"):
        c.generate(PROMPTS[:1], SAMPLING)


def test_a_server_that_was_given_up_gets_no_request() -> None:
    async def run() -> None:
        session: Any = None
        pool, work = ServerPool(["http://a"], 60.0, session), Work([1], 1, 0)
        server = pool.left()[0]
        pool.give_up(server, "dead")
        with pytest.raises(ServerLost):
            await pool.run(server, work, asyncio.sleep(60))

    asyncio.run(asyncio.wait_for(run(), 5))


def test_the_samples_of_a_request_are_aborted_together(servers: list[FakeServer]) -> None:
    """One after the other, a server that takes a moment for each would not hear of the last ones in time."""
    server, inside, most = servers[0], list[str](), [0]

    class Aborted(set[str]):
        def add(self, name: str) -> None:
            inside.append(name)
            time.sleep(0.2)
            most[0] = max(most[0], len(inside))
            inside.remove(name)
            super().add(name)

    server.aborted = Aborted()
    server.answer = lambda path, payload: (server.end.wait(30), (500, ""))[1]

    async def run() -> None:
        c = client([server])
        [payload] = generate_payloads(PROMPTS[:1], [0], replace(SAMPLING, num_samples_per_prompt=8), 64)
        async with c.open(SAMPLING) as sample:
            task = asyncio.create_task(sample(PROMPTS[0], 0, payload))  # type: ignore[arg-type]
            while not server.payloads:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait([task])

    asyncio.run(run())
    assert len(server.aborted) == 8 and most[0] > 1


def test_a_server_that_will_not_abort_is_named_once(
    servers: list[FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = servers[0]
    server.abort_status = 401
    server.answer = lambda path, payload: (server.end.wait(30), (500, ""))[1]

    async def run() -> None:
        payloads = generate_payloads(PROMPTS[:2], [0, 1], SAMPLING, 64)
        async with client([server]).open(SAMPLING) as sample:
            tasks = [asyncio.create_task(sample(PROMPTS[i], i, payloads[i])) for i in range(2)]  # type: ignore[arg-type]
            while len(server.payloads) < 2:
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    asyncio.run(run())
    told = [record.getMessage() for record in caplog.records if "aborted" in record.getMessage()]
    assert told == [f"{server.url} goes on with what was aborted: HTTP 401: not for you"]
