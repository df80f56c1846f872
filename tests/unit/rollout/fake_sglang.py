"""A small HTTP stand-in for SGLang in the tests' own process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STOP = 9
Reply = tuple[int, Any]


class FakeServer(ThreadingHTTPServer):
    """Answers every POST with `answer(path, payload)` and remembers the payloads; GET by `tp_size` and `status`.

    /abort_request is remembered in `aborted` alone; an `answer` that takes long may ask `is_aborted`.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.payloads: list[dict[str, Any]] = []
        self.aborted: set[str] = set()  # names of samples
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.tp_size, self.status, self.abort_status = 1, 200, 200
        self.probes: list[str] = []  # paths of GETs
        self.stopped = threading.Event()  # set: it accepts connections and never answers, like a stopped process
        self.end = threading.Event()
        self.answer: Callable[[str, dict[str, Any]], Reply] = lambda path, payload: (200, samples_of(payload))

    def hold(self) -> None:
        """While `stopped`, until the test is over."""
        if self.stopped.is_set():
            self.end.wait(30)
            raise ConnectionAbortedError

    def is_aborted(self, payload: dict[str, Any]) -> bool:
        """Whether all samples of this request were aborted."""
        return self.aborted >= set(payload["rid"])

    def handle_error(self, request: Any, client_address: Any) -> None: ...


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.hold()
        self.server.probes.append(self.path)
        info = {"tp_size": self.server.tp_size, "device": "cpu"}
        self.reply(self.server.status, info if self.path == "/server_info" else "")

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/abort_request":
            self.server.hold()
            self.server.aborted.add(payload["rid"])
            return self.reply(self.server.abort_status, "not for you" if self.server.abort_status != 200 else "")
        with self.server.lock:
            self.server.payloads.append(payload)
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
        try:
            self.server.hold()
            status, reply = self.server.answer(self.path, payload)
            self.server.hold()  # a process that was stopped meanwhile does not answer either
        finally:
            with self.server.lock:
                self.server.in_flight -= 1
        return self.reply(status, reply)

    def reply(self, status: int, reply: Any) -> None:
        body = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


def samples_of(payload: dict[str, Any], **meta: Any) -> list[dict[str, Any]]:
    """Each sample repeats its prompt's first id, with the seed's parity as log-prob, then stops."""
    return [
        {
            "meta_info": {
                "finish_reason": {"type": "stop", "matched": STOP},
                "weight_version": "3",
                "output_token_logprobs": [[-0.5, ids[0], None], [-1.5, STOP, None]],
            }
            | meta
        }
        for ids in payload["input_ids"]
    ]


@contextmanager
def running(port: int = 0) -> Iterator[FakeServer]:
    """A server on `port`, or on a free one, until the block ends."""
    fake = FakeServer(port)
    threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield fake
    finally:
        fake.end.set()
        fake.shutdown()
        fake.server_close()


SPAWNED = """
import http.server, json, os, pathlib, sys
if pathlib.Path(sys.argv[2]).exists():
    sys.exit("weights are corrupt")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"tp_size": 1, "device": "cpu", "pid": os.getppid()}).encode())
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
"""A program that answers as a server would: PORT, and a file that keeps it from starting while it is there."""
