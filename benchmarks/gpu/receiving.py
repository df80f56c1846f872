"""A small HTTP server on loopback, in a process that ends with its stdin: takes weights, where there is no SGLang."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

Reply = dict[str, Any]


def serve(answer: Callable[[str, Reply], tuple[int, Reply]]) -> None:
    """Print the URL, on a free port, and answer until stdin ends, that is with whoever started this process.

    answer: (path, body) to (HTTP status, reply), called from a thread a request.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Reply) -> None:
            status, reply = answer(self.path.partition("?")[0], body)
            text = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


@contextmanager
def receiver(module: str, *arguments: str) -> Iterator[str]:
    """The URL of `python -m MODULE ARGUMENTS`, which ends with the block. RuntimeError where it does not start."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError(f"{module} has ended; its error is above")
        yield url
    finally:
        process.stdin.close()
        process.wait()
