"""The client against a small HTTP stand-in for SGLang in this process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from fake_sglang import STOP, FakeServer, Reply, running, samples_of

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.experience.types import Prompt
from megatron_rpp.rollout.http import post_json
from megatron_rpp.rollout.payloads import generate_payloads
from megatron_rpp.rollout.protocol import RolloutError, SamplingParams
from megatron_rpp.rollout.replies import parse_version
from megatron_rpp.rollout.sglang_client import SGLangClient


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    with running() as first, running() as second:
        yield [first, second]


@pytest.fixture
def server(servers: list[FakeServer]) -> FakeServer:
    return servers[0]


def client(*urls: str, **rollout: Any) -> SGLangClient:
    return SGLangClient(urls, RolloutConfig(**rollout), decode=lambda ids: " ".join(map(str, ids)))


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=100 + i, text="", token_ids=(i, 7), answer="") for i in range(count)]


def sampling(samples: int = 2, seed: int = 0) -> SamplingParams:
    return SamplingParams(samples, 16, 1.0, 1.0, (STOP,), seed)


def test_results_keep_the_prompts_order_whichever_answers_first(server: FakeServer) -> None:
    def late_first(path: str, payload: dict[str, Any]) -> Reply:
        time.sleep(0.3 if payload["input_ids"][0][0] == 0 else 0.0)
        return 200, samples_of(payload)

    server.answer = late_first
    rollouts = client(server.url).generate(prompts(5), sampling(samples=3), group_ids=range(1, 10, 2))
    assert [r.prompt.id for r in rollouts] == [i for i in range(100, 105) for _ in range(3)]
    assert [r.group_id for r in rollouts] == [i for i in range(1, 10, 2) for _ in range(3)]
    assert [r.response_ids for r in rollouts] == [(i, STOP) for i in range(5) for _ in range(3)]


def test_a_rollout_keeps_the_stop_token_its_logprob_and_the_weights_version(server: FakeServer) -> None:
    rollout = client(server.url).generate(prompts(1), sampling(samples=1))[0]
    assert rollout.response_ids == (0, STOP)
    assert rollout.rollout_logprobs == (-0.5, -1.5)
    assert (rollout.text, rollout.finish_reason, rollout.policy_version) == ("0", "stop", 3)


def test_a_response_that_reached_its_limit_is_truncated(server: FakeServer) -> None:
    server.answer = lambda path, payload: (200, samples_of(payload, finish_reason={"type": "length"}))
    assert client(server.url).generate(prompts(1), sampling())[0].is_truncated


def test_an_aborted_response_is_never_trained_on(server: FakeServer) -> None:
    server.answer = lambda path, payload: (200, samples_of(payload, finish_reason={"type": "abort"}))
    with pytest.raises(RolloutError, match="abort"):
        client(server.url).generate(prompts(1), sampling())


def test_a_reply_without_samples_is_a_rollout_error(server: FakeServer) -> None:
    server.answer = lambda path, payload: (200, [{"error": "out of memory"}])
    with pytest.raises(RolloutError, match="out of memory"):
        client(server.url).generate(prompts(1), sampling(samples=1))


@pytest.mark.parametrize(("text", "version"), [("12", 12), ("default", -1), (None, -1), ("0", 0)])
def test_weights_that_no_sync_named_are_version_minus_one(text: str | None, version: int) -> None:
    assert parse_version(text) == version


def test_every_sample_has_its_own_seed_that_does_not_depend_on_its_neighbours() -> None:
    def seeds(group_ids: Sequence[int], seed: int) -> list[list[int]]:
        batch = [prompts(1)[0]] * len(group_ids)  # one prompt again and again: it must not repeat its samples
        payloads = generate_payloads(batch, group_ids, sampling(samples=4, seed=seed), context_length=64)
        return [[p["sampling_seed"] for p in payload["sampling_params"]] for payload in payloads]

    every = seeds(range(8), 1)
    assert len({s for group in every for s in group}) == 32
    assert seeds([3, 4], 1) == every[3:5], "another data-parallel layout must sample the same"
    assert not {s for g in seeds(range(8), 2) for s in g} & {s for g in every for s in g}
    assert all(0 <= s < 2**63 for group in every for s in group), "SGLang takes signed 64-bit seeds"


def test_a_response_is_limited_to_what_the_context_leaves() -> None:
    payload = generate_payloads(prompts(1), [0], sampling(), context_length=10)[0]
    assert [p["max_new_tokens"] for p in payload["sampling_params"]] == [8, 8]
    with pytest.raises(ValueError, match=r"rollout\.context_length=2 .*prompt 100 of 2 tokens"):
        generate_payloads(prompts(1), [0], sampling(), context_length=2)


def test_prompts_are_spread_over_the_servers(servers: list[FakeServer]) -> None:
    client(*(s.url for s in servers)).generate(prompts(6), sampling())
    assert [len(s.payloads) for s in servers] == [3, 3]


def test_no_more_requests_are_in_flight_than_allowed(server: FakeServer) -> None:
    def slow(path: str, payload: dict[str, Any]) -> Reply:
        time.sleep(0.02)
        return 200, samples_of(payload)

    server.answer = slow
    client(server.url, max_concurrent_requests=3).generate(prompts(12), sampling())
    assert server.most_in_flight == 3


def test_progress_counts_responses_up_to_all(server: FakeServer) -> None:
    seen: list[tuple[int, int]] = []
    client(server.url).generate(prompts(4), sampling(), progress=lambda done, asked: seen.append((done, asked)))
    assert seen == [(2, 8), (4, 8), (6, 8), (8, 8)]


def test_a_server_error_is_retried(server: FakeServer) -> None:
    replies: list[Reply] = [(500, "busy"), (503, "busy")]
    server.answer = lambda path, payload: replies.pop() if replies else (200, samples_of(payload))
    assert len(client(server.url, max_retries=2).generate(prompts(1), sampling())) == 2
    names = [name for payload in server.payloads for name in payload.pop("rid")]
    assert len(server.payloads) == 3 and server.payloads[0] == server.payloads[2], "a retry keeps its seeds"
    assert len(set(names)) == 6, "SGLang refuses a second request of a name that it still works on"


def test_a_dead_server_is_replaced_by_the_next(servers: list[FakeServer]) -> None:
    dead, alive = servers
    dead.server_close()
    rollouts = client(dead.url, alive.url, max_retries=1).generate(prompts(4), sampling())
    assert len(rollouts) == 8 and len(alive.payloads) == 4


def test_when_retries_do_not_help_the_error_names_server_and_cause(server: FakeServer) -> None:
    server.answer = lambda path, payload: (500, {"error": {"message": "scheduler is gone"}})
    with pytest.raises(RolloutError, match=rf"{server.url}/generate.*500.*scheduler is gone.*max_retries=1"):
        client(server.url, max_retries=1).generate(prompts(3), sampling())


def test_a_wrong_request_fails_at_once_with_the_servers_message(server: FakeServer) -> None:
    server.answer = lambda path, payload: (400, {"error": {"message": "Input length exceeds"}})
    with pytest.raises(RolloutError, match="400: Input length exceeds"):
        client(server.url, max_retries=3).generate(prompts(1), sampling())
    assert len(server.payloads) == 1


def test_past_the_deadline_the_error_says_how_much_came(server: FakeServer) -> None:
    def hang_on_the_second(path: str, payload: dict[str, Any]) -> Reply:
        time.sleep(3.0 if payload["input_ids"][0][0] == 1 else 0.0)
        return 200, samples_of(payload)

    server.answer = hang_on_the_second
    start = time.monotonic()
    with pytest.raises(RolloutError, match=r"2 of 4 responses.*request_deadline_s=0\.5"):
        client(server.url, request_deadline_s=0.5).generate(prompts(2), sampling())
    assert time.monotonic() - start < 2.0


def test_a_missing_sample_is_an_error_not_a_shorter_group(server: FakeServer) -> None:
    server.answer = lambda path, payload: (200, samples_of(payload)[:1])
    with pytest.raises(RolloutError, match="1 samples of 2 asked"):
        client(server.url).generate(prompts(1), sampling())


def test_without_servers_the_error_says_so() -> None:
    with pytest.raises(RolloutError, match="no SGLang server"):
        client().generate(prompts(1), sampling())


def test_post_gives_the_reply_and_its_errors_name_the_endpoint(server: FakeServer) -> None:
    server.answer = lambda path, payload: (200, {"success": True, "at": path, "got": payload})
    reply = post_json(server.url, "begin_weight_update", {"a": 1}, 5.0)
    assert (reply["at"], reply["got"]) == ("/begin_weight_update", {"a": 1})
    server.answer = lambda path, payload: (400, {"message": "no session"})
    with pytest.raises(RolloutError, match=rf"{server.url}/end_weight_update: HTTP 400: no session"):
        post_json(server.url, "end_weight_update", {}, 5.0)
    server.answer = lambda path, payload: (200, {"success": False, "message": "shape mismatch"})
    with pytest.raises(RolloutError, match="shape mismatch"):
        post_json(server.url, "update_weights_from_disk", {}, 5.0)


def test_post_does_not_wait_past_its_timeout(server: FakeServer) -> None:
    def hang(path: str, payload: dict[str, Any]) -> Reply:
        time.sleep(2.0)
        return 200, {}

    server.answer = hang
    start = time.monotonic()
    with pytest.raises(RolloutError, match="flush_cache"):
        post_json(server.url, "flush_cache", {}, 0.2)
    assert time.monotonic() - start < 1.5
