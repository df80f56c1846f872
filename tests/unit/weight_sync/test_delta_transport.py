"""What a server could not load is learnt from every server at once, and told with its URL."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_rpp.rollout.fleet import Server
from megatron_rpp.rollout.in_server.delta_loader import FAILED
from megatron_rpp.rollout.probe import ServerInfo
from megatron_rpp.weight_sync.delta_transport import check_loaded
from megatron_rpp.weight_sync.phases import for_each_server
from megatron_rpp.weight_sync.transport import Deadline, ServerFailure

Answer = Callable[[str], tuple[int, Any]]  # of a path: (status, JSON)


class Fake:
    """A server of two ranks; `notes` are what its second rank could not load."""

    def __init__(self, *notes: str) -> None:
        self.notes = [FAILED + note.encode().hex() for note in notes]
        self.paths: list[str] = []
        self.broken = ""  # a path that answers 500

    def answer(self, path: str) -> tuple[int, Any]:
        self.paths.append(path)
        if path == self.broken:
            return 500, {"error": "out of memory"}
        if path == "/update_weights_from_tensor":
            self.notes = []
            return 200, {"success": True}
        ranks = [{"checksums": {}}, {"checksums": dict.fromkeys(self.notes, "0")}]
        return 200, {"ranks": [rank | {"parallelism_info": {}} for rank in ranks]}


@contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, reply = answer(self.path)
            body = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield Server(f"http://127.0.0.1:{http.server_port}", ServerInfo(2, "cpu"), 0)
    finally:
        http.shutdown()
        http.server_close()


def failures_of(*answers: Answer) -> dict[int, str]:
    """By the place of the server, what `check_loaded` said of it."""
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(answer)) for answer in answers]
        with pytest.raises(ExceptionGroup) as raised:
            for_each_server(servers, check_loaded, Deadline("send", 20.0))
        found: dict[int, str] = {}
        for failure in raised.value.exceptions:
            assert isinstance(failure, ServerFailure)
            found[[server.url for server in servers].index(failure.server)] = str(failure)
        return found


def test_each_server_that_could_not_load_is_blamed_and_its_notes_are_gone() -> None:
    first, good, third = Fake("a.weight: too small"), Fake(), Fake("b.weight: too large")
    found = failures_of(first.answer, good.answer, third.answer)
    assert found == {0: "server rank 1: a.weight: too small", 2: "server rank 1: b.weight: too large"}
    assert first.notes == third.notes == [], "they would stand among the tensors that the next sync compares"
    assert good.paths == ["/weights_checker"], "nothing is posted to a server that loaded all"


def test_a_server_that_cannot_be_asked_is_blamed_and_the_others_notes_are_gone() -> None:
    mute, bad = Fake(), Fake("a.weight: too small")
    mute.broken = "/weights_checker"
    found = failures_of(mute.answer, bad.answer)
    assert found.keys() == {0, 1} and "out of memory" in found[0]
    assert bad.notes == []


def test_notes_that_stay_are_told_beside_the_cause() -> None:
    bad = Fake("a.weight: too small")
    bad.broken = "/update_weights_from_tensor"
    (message,) = failures_of(bad.answer).values()
    assert message.startswith("server rank 1: a.weight: too small; ") and "could not be taken away" in message


def test_servers_are_asked_at_once() -> None:
    """Each answers only when all have been asked."""
    all_asked = threading.Barrier(3, timeout=10)

    def answer(fake: Fake, path: str) -> tuple[int, Any]:
        if path == "/weights_checker":
            all_asked.wait()
        return fake.answer(path)

    servers = [partial(answer, Fake("a.weight: too small")) for _ in range(3)]
    assert len(failures_of(*servers)) == 3
