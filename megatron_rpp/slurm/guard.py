"""A guard on every node: the supervisor sees at once which node is gone, and the nodes see if the supervisor's is.

SLURM itself notices a dead node only after SlurmdTimeout, five minutes on many sites. Guards and supervisor
exchange a byte now and then over TCP. Where the batch host dies, the supervisor dies with it: then the first guard
left submits the replacement.

    python -m megatron_rpp.slurm.guard SUPERVISOR_HOST PORT DEADLINE_S RUN_DIR ATTEMPT
"""

from __future__ import annotations

import logging
import os
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from megatron_rpp.slurm import client
from megatron_rpp.slurm.replacement import Replacement

logger = logging.getLogger("megatron_rpp.slurm")

_BEAT, _FAREWELL = b".", b"q"
_START_S = 120.0  # a guard may take so long to start


def beat_s(deadline_s: float) -> float:
    """Pause between two beats."""
    return min(1.0, deadline_s / 10)


class NodeWatch:
    """The supervisor's side: who is there, who has fallen silent."""

    def __init__(self, nodes: Sequence[str], deadline_s: float) -> None:
        self._nodes, self._deadline_s = tuple(nodes), deadline_s
        self._seen: dict[str, float] = {}  # node -> monotonic seconds of its last beat
        self._started_at = time.monotonic()
        self._is_over = threading.Event()
        self._server = socketserver.ThreadingTCPServer(("", 0), self._handler(), bind_and_activate=True)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def lost(self) -> tuple[str, ...]:
        """Nodes whose guard fell silent. None before the first guard is there: then nothing can be told."""
        if not self._seen:
            return ()
        now = time.monotonic()
        never = now - self._started_at > _START_S + self._deadline_s
        silent = {node for node, at in self._seen.items() if now - at > self._deadline_s}
        return tuple(node for node in self._nodes if node in silent or (never and node not in self._seen))

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
        try:
            with connection, connection.makefile("rb") as lines:
                node = lines.readline().decode().strip()
                while not self._is_over.is_set():
                    self._seen[node] = time.monotonic()
                    connection.sendall(_BEAT)
                    if lines.read(1) != _BEAT:
                        return
                connection.sendall(_FAREWELL)
        except OSError:
            return  # silence is what `lost` looks at


def stand_guard(host: str, port: int, deadline_s: float, node: str) -> bool:
    """Exchange beats until the supervisor says farewell (True) or falls silent (False)."""
    try:
        with socket.create_connection((host, port), timeout=deadline_s) as connection:
            connection.settimeout(deadline_s)
            connection.sendall(f"{node}\n".encode())
            while True:
                got = connection.recv(1)
                if got != _BEAT:
                    return got == _FAREWELL
                time.sleep(beat_s(deadline_s))
                connection.sendall(_BEAT)
    except OSError as error:
        logger.warning("the supervisor on %s is silent: %s", host, error)
        return False


def rescue(replacement: Replacement, lost_host: str, turn: int, deadline_s: float) -> None:
    """The supervisor's node is gone: submit the job anew without it, unless someone else has, or SLURM ended it."""
    time.sleep(turn * deadline_s)  # one guard after the other, so that the next one sees what the first has done
    job_id = replacement.attempt.partition(".")[0]
    if client.job_fields(job_id).get("JobState") != "RUNNING" or not replacement.claim():
        return
    try:
        new = replacement.submit([lost_host], cause=f"node {lost_host}, which ran the batch script, is lost")
    except client.SlurmError:
        replacement.give_back()
        raise
    sys.stderr.write(f"rpp: node {lost_host} is lost; job {new} replaces job {job_id}\n")
    client.cancel(job_id)


def main(words: Sequence[str]) -> int:
    host, port, deadline_s, run_dir, attempt = words
    node = os.environ["SLURMD_NODENAME"]
    if stand_guard(host, int(port), float(deadline_s), node):
        return 0
    replacement = Replacement(Path(run_dir), attempt)
    nodes = replacement.load().nodes
    lost_host = nodes[0]
    if node != lost_host:  # on the batch host itself SLURM ends or requeues the job with its script
        rescue(replacement, lost_host, nodes.index(node) - 1, float(deadline_s))
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
