"""The control requests of a sync, against a server that is only its replies."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rpp.rollout import control
from megatron_rpp.rollout.protocol import RolloutError

URL = "http://server:1"


class Replies:
    """In place of post_json and get_json: what each endpoint answers in turn, and what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: list[Any]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, Any]] = []
        monkeypatch.setattr(control, "post_json", lambda url, endpoint, payload, timeout_s: self.of(endpoint, payload))
        monkeypatch.setattr(control, "get_json", lambda url, endpoint, timeout_s: self.of(endpoint, None))

    def of(self, endpoint: str, payload: Any) -> Any:
        self.asked.append((endpoint, payload))
        answers = self.answers.get(endpoint.partition("?")[0].replace("/", "_"), [{}])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def endpoints(self) -> list[str]:
        return [endpoint for endpoint, _ in self.asked]


def test_a_session_that_a_dead_trainer_left_open_is_closed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    open_ = RolloutError(f"{URL}/begin_weight_update: HTTP 400: a weight-update session is already open")
    server = Replies(monkeypatch, begin_weight_update=[open_, {}])
    control.begin_update(URL, 5)
    assert server.endpoints == ["begin_weight_update", "end_weight_update", "begin_weight_update"]


def test_an_older_server_without_update_sessions_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = [RolloutError(f"{URL}/x: HTTP 404: Not Found")]
    Replies(monkeypatch, begin_weight_update=absent, end_weight_update=absent)
    control.begin_update(URL, 5)
    control.end_update(URL, 5)


def test_another_refusal_to_begin_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Replies(monkeypatch, begin_weight_update=[RolloutError("HTTP 500: out of memory")])
    with pytest.raises(RolloutError, match="out of memory"):
        control.begin_update(URL, 5)


def test_drain_waits_until_no_request_runs_or_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = [{"loads": [{"num_running_reqs": 1}, {"num_waiting_reqs": 2}]}, {"loads": [{"num_waiting_reqs": 1}]}]
    server = Replies(monkeypatch, v1_loads=[*loads, {"loads": [{"num_running_reqs": 0}]}])
    control.pause(URL, "drain", 30)
    assert len(server.endpoints) == 4 and server.asked[-1] == ("pause_generation", {"mode": "retract"})


def test_requests_that_never_end_are_an_error_that_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    Replies(monkeypatch, v1_loads=[{"loads": [{"num_running_reqs": 3}]}])
    with pytest.raises(RolloutError, match=r"3 requests still run; set weight_sync\.pause to abort or retract"):
        control.pause(URL, "drain", 0.2)


@pytest.mark.parametrize("mode", ["abort", "retract"])
def test_the_other_modes_do_not_wait(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    server = Replies(monkeypatch)
    control.pause(URL, mode, 5)
    assert server.asked == [("pause_generation", {"mode": mode})]


@pytest.mark.parametrize("reply", [{}, {"ranks": "?"}, {"ranks": [{"checksums": {}}]}])
def test_a_reply_without_checksums_or_places_is_an_error_and_no_proof(
    monkeypatch: pytest.MonkeyPatch, reply: dict[str, Any]
) -> None:
    Replies(monkeypatch, weights_checker=[reply])
    with pytest.raises(RolloutError, match="no checksums in its reply"):
        control.checksums(URL, (), 5)


def test_naming_a_version_aborts_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Replies(monkeypatch)
    control.set_version(URL, "7", 5)
    assert server.asked == [("update_weight_version", {"new_version": "7", "abort_all_requests": False})]
