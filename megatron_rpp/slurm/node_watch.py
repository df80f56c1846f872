"""The supervisor's view of its nodes: which are silent. guard.py has the other end."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Sequence
from typing import cast

BEAT, FAREWELL = b".", b"q"
_START_S = 120.0  # a guard may take so long to start


def beat_s(deadline_s: float) -> float:
    """Pause between two beats."""
    return min(1.0, deadline_s / 10)


class NodeWatch:
    """Exchanges beats with the guards over TCP.

    A guard whose connection is closed has ended, so its node's kernel lives: only silence is a lost node.
    """

    def __init__(self, nodes: Sequence[str], deadline_s: float) -> None:
        self._nodes, self._deadline_s = tuple(nodes), deadline_s
        self._seen: dict[str, float] = {}  # node with a connection -> monotonic seconds of its last beat
        self._known: set[str] = set()  # nodes that have ever been there
        self._started_at = time.monotonic()
        self._is_over = threading.Event()
        self._server = _Server(("", 0), self._handler(), bind_and_activate=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def lost(self) -> tuple[str, ...]:
        """Nodes whose guard fell silent, or never came. None before the first is there: then nothing can be told."""
        if not self._known:
            return ()
        now = time.monotonic()
        never = now - self._started_at > _START_S + self._deadline_s
        silent = {node for node, at in list(self._seen.items()) if now - at > self._deadline_s}
        return tuple(node for node in self._nodes if node in silent or (never and node not in self._known))

    def close(self) -> None:
        """Tell the guards that the job ends."""
        self._is_over.set()
        if self._seen:
            time.sleep(2 * beat_s(self._deadline_s))  # every handler passes by once
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[socketserver.BaseRequestHandler]:
        watch = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                watch._serve(cast(socket.socket, self.request))

        return Handler

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(self._deadline_s)
        node = ""
        try:
            with connection, connection.makefile("rb") as lines:
                node = lines.readline().decode().strip()
                self._known.add(node)
                while not self._is_over.is_set():
                    self._seen[node] = time.monotonic()
                    connection.sendall(BEAT)
                    if lines.read(1) != BEAT:
                        break
                else:
                    connection.sendall(FAREWELL)
            del self._seen[node]
        except TimeoutError:
            return  # `lost` will say so
        except OSError:
            self._seen.pop(node, None)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 1024  # all guards come at once
