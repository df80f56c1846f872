"""Guards and supervisor over loopback: each notices within the deadline that the other is gone."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from megatron_rpp.slurm.guard import End, stand_guard
from megatron_rpp.slurm.node_watch import NodeWatch

DEADLINE_S = 3.0


@pytest.fixture
def watch() -> Iterator[NodeWatch]:
    watch = NodeWatch(["a", "b"], DEADLINE_S)
    yield watch
    watch.close()


def in_background(act: Callable[[], End]) -> tuple[threading.Thread, list[End]]:
    answers: list[End] = []
    thread = threading.Thread(target=lambda: answers.append(act()), daemon=True)
    thread.start()
    return thread, answers


def wait_for(what: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)


def test_a_node_that_falls_silent_is_lost_and_the_others_are_not(watch: NodeWatch) -> None:
    guard, _ = in_background(lambda: stand_guard("127.0.0.1", watch.port, DEADLINE_S, "a"))
    with socket.create_connection(("127.0.0.1", watch.port)) as silent:  # connects, and never answers a beat
        silent.sendall(b"b\n")
        wait_for(lambda: watch.lost() == ("b",), 4 * DEADLINE_S)
        time.sleep(DEADLINE_S / 2)
        assert watch.lost() == ("b",) and guard.is_alive()  # while it is connected: a closed connection is an end


def test_a_guard_is_told_the_end_of_the_job_from_the_loss_of_the_supervisor() -> None:
    watch = NodeWatch(["a"], DEADLINE_S)
    thread, answers = in_background(lambda: stand_guard("127.0.0.1", watch.port, DEADLINE_S, "a"))
    wait_for(lambda: bool(watch._seen), DEADLINE_S)
    watch.close()
    thread.join(DEADLINE_S)
    assert answers == [End.FAREWELL]


def test_a_guard_tells_silence_from_an_ended_supervisor_and_from_one_that_was_never_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert stand_guard("127.0.0.1", port, 0.5, "a") == End.NEVER, "it has not said anything yet"
        _, answers = in_background(lambda: stand_guard("127.0.0.1", port, 0.5, "a"))
        server.accept()[0].close()  # of the attempt above
        with server.accept()[0] as connection:
            connection.sendall(b".")
            wait_for(lambda: answers == [End.SILENT], 10)
        _, answers = in_background(lambda: stand_guard("127.0.0.1", port, 0.5, "a"))
        server.accept()[0].close()  # of the second attempt of the guard before
        with server.accept()[0] as connection:
            connection.sendall(b".")
    wait_for(lambda: answers == [End.CLOSED], 10)


def test_nothing_is_told_before_any_guard_is_there(watch: NodeWatch) -> None:
    watch._started_at -= 1000  # a site whose nodes may not connect to each other
    assert watch.lost() == ()
    in_background(lambda: stand_guard("127.0.0.1", watch.port, DEADLINE_S, "a"))
    wait_for(lambda: watch.lost() == ("b",), DEADLINE_S)
