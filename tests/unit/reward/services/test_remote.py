"""Rewards from a service: right where it answers, an error that names it in time where it does not."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.experience.types import Prompt, Rollout, VersionSpan
from megatron_rpp.reward.protocol import RewardError
from megatron_rpp.reward.services.remote import RemoteReward
from megatron_rpp.reward.services.service import Request, Service, finite
from tests.unit.rollout.fake_sglang import FakeServer, Reply, running

Payload = dict[str, Any]


def rollout(number: int, finish_reason: str = "stop") -> Rollout:
    prompt = Prompt(number, f"prompt {number}", (1,), f"answer {number}", {"level": number}, "algebra")
    return Rollout(prompt, 0, (1,), (0.0,), f"response {number}", finish_reason, (VersionSpan(0, 0, 1),))


ROLLOUTS = [rollout(number) for number in range(100)]


def judge(path: str, payload: Payload) -> Reply:
    """The number at the end of each response."""
    return 200, {"rewards": [int(each["response"].split()[1]) for each in payload["responses"]]}


@pytest.fixture
def service() -> Iterator[FakeServer]:
    with running() as fake:
        fake.answer = judge
        yield fake


def reward(fake: FakeServer, **settings: Any) -> RemoteReward:
    return RemoteReward(
        RewardConfig(kind="remote", url=f"{fake.url}/score", **{"request_deadline_s": 20.0, **settings})
    )


def failing(times: int, failure: Callable[[], Reply]) -> Callable[[str, Payload], Reply]:
    """`failure` the first `times` times, then the truth."""
    left, lock = [times], threading.Lock()

    def answer(path: str, payload: Payload) -> Reply:
        with lock:
            left[0] -= 1
            is_failure = left[0] >= 0
        return failure() if is_failure else judge(path, payload)

    return answer


def close_connection() -> Reply:
    raise ConnectionAbortedError


def test_rewards_come_back_in_order_from_several_requests_at_once(service: FakeServer) -> None:
    def slowly(path: str, payload: Payload) -> Reply:
        time.sleep(0.2)
        return judge(path, payload)

    service.answer = slowly
    assert reward(service)(ROLLOUTS) == [float(number) for number in range(100)]
    assert len(service.payloads) > 1, "all in one request"
    assert service.most_in_flight > 1, "one request after another"
    assert reward(service)([]) == []


def test_the_service_is_told_what_a_verifier_may_want(service: FakeServer) -> None:
    reward(service)([rollout(7, "length")])
    assert service.payloads == [
        {
            "responses": [
                {
                    "prompt": "prompt 7",
                    "response": "response 7",
                    "answer": "answer 7",
                    "source": "algebra",
                    "truncated": True,
                    "metadata": {"level": 7},
                }
            ]
        }
    ]


def test_numbers_that_json_cannot_hold_are_sent_as_null(service: FakeServer) -> None:
    metadata = {"rate": float("nan"), "range": [float("inf"), -1.5, (float("-inf"),)], "x": {3: float("nan")}}
    told = rollout(7)
    reward(service)([replace(told, prompt=replace(told.prompt, metadata=metadata))])
    sent = service.payloads[0]["responses"][0]["metadata"]
    assert sent == {"rate": None, "range": [None, -1.5, [None]], "x": {"3": None}}


@pytest.mark.parametrize(
    "failure",
    [lambda: (500, "out of order"), lambda: (429, "slow down"), lambda: (503, ""), close_connection],
    ids=["500", "429", "503", "closed"],
)
def test_what_may_pass_is_tried_again(service: FakeServer, failure: Callable[[], Reply]) -> None:
    service.answer = failing(2, failure)
    assert reward(service)(ROLLOUTS[:3]) == [0.0, 1.0, 2.0]
    assert len(service.payloads) == 3


def test_retries_end(service: FakeServer) -> None:
    service.answer = lambda path, payload: (500, {"error": "out of order"})
    with pytest.raises(RewardError, match=r"/score: HTTP 500: out of order \(after reward.max_retries=1 retries\)"):
        reward(service, max_retries=1)(ROLLOUTS[:3])
    assert len(service.payloads) == 2


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ((404, "no such page " + "x" * 5000), "HTTP 404: no such page x"),
        ((422, {"error": {"message": "answer is missing"}}), "HTTP 422: answer is missing"),
        ((200, {"rewards": [1.0, 2.0]}), "2 rewards came back for 3 responses"),
        ((200, {"rewards": [1.0, float("nan"), 2.0]}), "must be a finite number, not nan"),
        ((200, {"rewards": [1.0, float("inf"), 2.0]}), "must be a finite number, not inf"),
        ((200, {"rewards": [1.0, "2", 2.0]}), "must be a finite number, not '2'"),
        ((200, {"rewards": [1.0, True, 2.0]}), "must be a finite number, not True"),
        ((200, {"rewards": 1.0}), "a list of 3 rewards was wanted"),
        ((200, {"scores": [1, 2, 3]}), r"the reply must be \{\"rewards\": \[\.\.\.\]\}; the reply begins '{\"scores\""),
        ((200, [1, 2, 3]), "the reply must be"),
        ((200, "<html>Welcome to nginx" + "!" * 5000), "the reply begins '<html>Welcome to nginx"),
    ],
)
def test_a_reply_that_will_not_get_better_is_an_error_at_once(service: FakeServer, reply: Reply, expected: str) -> None:
    service.answer = lambda path, payload: reply
    with pytest.raises(RewardError, match=expected) as caught:
        reward(service)(ROLLOUTS[:3])
    assert f"{service.url}/score" in str(caught.value), "the error does not say who"
    assert len(str(caught.value)) < 500, "the error repeats too much"
    assert len(service.payloads) == 1, "asked again in vain"


def test_a_service_that_never_answers_costs_the_deadline_and_no_more(service: FakeServer) -> None:
    service.stopped.set()
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"0 of 4 requests to http.* within reward.request_deadline_s=1 s"):
        reward(service, request_deadline_s=1.0)(ROLLOUTS)
    assert time.monotonic() - start < 5


def test_a_service_that_trickles_costs_the_deadline_and_no_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle() -> None:
            connection, _ = listener.accept()
            with connection:
                try:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                    for _ in range(100):
                        connection.sendall(b" ")
                        time.sleep(0.1)
                except OSError:
                    return

        threading.Thread(target=trickle, daemon=True).start()
        config = RewardConfig(url=f"http://127.0.0.1:{listener.getsockname()[1]}", request_deadline_s=1.0)
        start = time.monotonic()
        with pytest.raises(RewardError, match=r"reward.request_deadline_s=1 s"):
            RemoteReward(config)(ROLLOUTS[:1])
        assert time.monotonic() - start < 5


def test_nobody_listening_is_an_error_after_the_retries() -> None:
    with running() as gone:
        pass
    with pytest.raises(RewardError, match=r"Cannot connect .* \(after reward.max_retries=1 retries\)"):
        reward(gone, max_retries=1)(ROLLOUTS[:1])


def test_another_server_takes_over_from_one_that_fails() -> None:
    with running() as broken, running() as well:
        broken.answer = lambda path, payload: (500, "out of order")
        well.answer = judge
        both = Service((f"{broken.url}/score", f"{well.url}/score"), deadline_s=20.0, max_retries=0)
        requests = [Request({"responses": [{"response": f"response {i}"}]}, 1) for i in range(6)]
        assert both.score(requests, lambda reply, count: finite(reply["rewards"], count)) == [0, 1, 2, 3, 4, 5]
        assert broken.payloads, "the broken one was never asked"


def test_a_server_that_is_started_again_is_waited_for() -> None:
    with running() as gone:
        port = gone.server_port
    service = Service((f"http://127.0.0.1:{port}/score",), deadline_s=20.0, max_retries=0, is_restarted=True)
    requests = [Request({"responses": [{"response": "response 5"}]}, 1)]
    with Late(port) as late:
        assert service.score(requests, lambda reply, count: finite(reply["rewards"], count)) == [5]
        assert late.fake is not None


class Late:
    """A service that listens a second after it was entered."""

    def __init__(self, port: int) -> None:
        self._port, self._end = port, threading.Event()
        self.fake: FakeServer | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        time.sleep(1.0)
        with running(self._port) as fake:
            fake.answer, self.fake = judge, fake
            self._end.wait(30)

    def __enter__(self) -> Late:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()


def test_it_may_be_called_from_within_a_running_loop(service: FakeServer) -> None:
    async def inside() -> list[float]:
        return reward(service)(ROLLOUTS[:2])

    assert asyncio.run(inside()) == [0.0, 1.0]
