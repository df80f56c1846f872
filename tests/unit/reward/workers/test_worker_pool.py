"""Verifiers that misbehave cost at most their limits, and their neighbours nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rpp.reward.workers import fork_server
from megatron_rpp.reward.workers.scoring_worker import CLOCK_FACTOR
from megatron_rpp.reward.workers.worker_pool import Limits, WorkerPool
from tests.support.bad_verifiers import SCORER

RIGHT, WRONG = ("right", None), ("wrong", None)
LIMITS = Limits(time_s=0.6, batch_time_s=30.0, memory_mb=128, workers=2)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(SCORER, LIMITS)
    pool.score([RIGHT])  # starts the parent, which costs a second on a busy machine
    yield pool
    pool.close()


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The parents that are started, by their ids."""
    found: list[int] = []
    spawn = fork_server._spawn

    def counted(control_fd: int) -> subprocess.Popen[bytes]:
        process = spawn(control_fd)
        found.append(process.pid)
        return process

    monkeypatch.setattr(fork_server, "_spawn", counted)
    return found


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def descendants(pid: int) -> list[int]:
    own = children(pid)
    return own + [below for child in own for below in descendants(child)]


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def _open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def parent_of(pool: WorkerPool) -> int:
    process = pool._server._process
    assert process is not None
    return process.pid


def eventually(condition: object, what: str) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


LATE = {"reward/timeouts": 1.0, "reward/broken": 0.0}
BROKEN = {"reward/timeouts": 0.0, "reward/broken": 1.0}


@pytest.mark.parametrize("deed", ["loop", "sleep", "one C call", "fork and hang"])
def test_a_verifier_that_never_returns_costs_its_limit(pool: WorkerPool, deed: str) -> None:
    pool.metrics()
    start = time.monotonic()
    assert pool.score([RIGHT, (deed, None), WRONG, RIGHT]) == [1.0, 0.0, 0.0, 1.0]
    assert time.monotonic() - start < CLOCK_FACTOR * (LIMITS.patience_s + LIMITS.time_s) + 10.0
    assert pool.metrics().sums == LATE


@pytest.mark.parametrize(
    "deed",
    [
        "eat memory",
        "segfault",
        "abort",
        "exit",
        "raise",
        "close everything",
        "kill the parent",
        "garbage on the channel",
        "a score of another item",
        "garbage without end",
    ],
)
def test_a_verifier_that_breaks_its_process_is_wrong_and_counted(pool: WorkerPool, deed: str) -> None:
    pool.metrics()
    assert pool.score([RIGHT, (deed, None), WRONG, RIGHT]) == [1.0, 0.0, 0.0, 1.0]
    assert pool.metrics().sums == BROKEN


def test_a_verifier_that_recurses_without_end_is_wrong_and_counted(pool: WorkerPool) -> None:
    pool.metrics()
    assert pool.score([RIGHT, ("recurse", None), WRONG, RIGHT]) == [1.0, 0.0, 0.0, 1.0]
    assert pool.metrics().sums in (LATE, BROKEN)  # whether it fills its memory in time depends on the machine


@pytest.mark.parametrize("deed", ["fork and answer", "print garbage", "a score above 1"])
def test_bad_manners_do_not_change_a_score(pool: WorkerPool, deed: str) -> None:
    assert pool.score([RIGHT, (deed, None), WRONG, RIGHT]) == [1.0, 1.0, 0.0, 1.0]


def test_not_a_number_is_no_score(pool: WorkerPool) -> None:
    assert pool.score([("not a number", None), RIGHT]) == [0.0, 1.0]


def test_no_process_outlives_a_call_but_the_parent(pool: WorkerPool) -> None:
    pool.score([(deed, None) for deed in ("fork and hang", "loop", "fork and answer")])
    eventually(lambda: children(parent_of(pool)) == [], "workers are still there")


def test_honest_answers_are_scored_though_the_call_ends_in_hanging_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rpp.reward.workers.worker_pool.PATIENCE_S", 0.1)
    limits = Limits(time_s=2.0, batch_time_s=2.5, memory_mb=128, workers=2)  # the four hanging ones take 4 s or more
    pool = WorkerPool(SCORER, limits)
    items = [("loop", None) if i < 4 else RIGHT for i in range(200)]
    assert pool.score(items) == [0.0] * 4 + [1.0] * 196
    assert pool.metrics().sums == {"reward/timeouts": 4.0, "reward/broken": 0.0}
    pool.close()


def test_another_worker_is_a_fork_away(pool: WorkerPool, starts: list[int]) -> None:
    assert sum(pool.score([("exit", None), RIGHT] * 50)) == 50.0
    assert starts == [], "100 workers were replaced by importing anew"


def test_a_worn_worker_is_replaced_and_no_answer_is_lost(pool: WorkerPool) -> None:
    assert pool.score([RIGHT, WRONG] * 600) == [1.0, 0.0] * 600


def test_a_parent_that_was_killed_is_started_again(pool: WorkerPool, starts: list[int]) -> None:
    os.kill(parent_of(pool), signal.SIGKILL)
    assert pool.score([RIGHT, WRONG]) == [1.0, 0.0]
    assert len(starts) == 1


def test_honest_answers_are_right_though_the_parent_is_killed_under_them(pool: WorkerPool, starts: list[int]) -> None:
    pool.metrics()
    parent = parent_of(pool)

    def kill_once_both_work() -> None:
        eventually(lambda: len(children(parent)) == 2, "the workers never came")
        os.kill(parent, signal.SIGKILL)

    killer = threading.Thread(target=kill_once_both_work)
    killer.start()
    scores = pool.score([("nap and be right", None)] * 100)
    killer.join()
    assert scores == [1.0] * 100
    assert len(starts) == 1, "one death was answered with several parents, or with none"
    assert pool.metrics().sums == {"reward/timeouts": 0.0, "reward/broken": 0.0}


@pytest.mark.parametrize("deaths", [1, 3])
def test_a_parent_that_is_killed_as_it_starts_is_started_again(deaths: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spawn, left = fork_server._spawn, [deaths]

    def killed_at_first(control_fd: int) -> subprocess.Popen[bytes]:
        process = spawn(control_fd)
        left[0] -= 1
        if left[0] >= 0:
            process.kill()
        return process

    monkeypatch.setattr(fork_server, "_spawn", killed_at_first)
    pool = WorkerPool(SCORER, LIMITS)
    if deaths < fork_server.MAX_STARTS:
        assert pool.score([RIGHT, WRONG]) == [1.0, 0.0]
        pool.close()
    else:
        with pytest.raises(RuntimeError, match="workers ended 3 times: something kills it"):
            pool.score([RIGHT])


def test_only_its_own_workers_are_killed(pool: WorkerPool) -> None:
    server = pool._server
    worker = server.fork(1 << 30)
    with subprocess.Popen(["sleep", "60"]) as stranger:
        assert server.kill(replace(worker, pid=stranger.pid, channel=socket.socket())) == 0
        assert stranger.poll() is None, "a process of somebody else was killed"
        stranger.kill()
    assert server.kill(worker) == signal.SIGKILL, "the parent did not survive being asked"
    server.close()
    later = server.fork(1 << 30)
    assert server.kill(replace(worker, pid=later.pid, channel=socket.socket())) is None
    assert children(parent_of(pool)) == [later.pid], "a number of an earlier parent's worker ended a later one's"
    assert server.kill(later) == signal.SIGKILL


def test_nothing_is_left_of_a_trainer_that_was_killed() -> None:
    script = (
        "from tests.unit.reward.workers.test_worker_pool import *\n"
        "WorkerPool(SCORER, Limits(60.0, 60.0, 128, 2)).score([('fork and hang', None)] * 2)"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as trainer:
        eventually(lambda: len(descendants(trainer.pid)) == 5, "not a parent and two workers and what these forked")
        family = descendants(trainer.pid)
        trainer.kill()
    eventually(lambda: all(_is_gone(pid) for pid in family), "a process outlives the trainer")


def test_calls_leave_no_open_file_and_close_leaves_no_process(pool: WorkerPool) -> None:
    pool.score([RIGHT])
    parent = parent_of(pool)
    before = _open_files(os.getpid()), _open_files(parent)
    for _ in range(25):
        pool.score([RIGHT, ("exit", None)])
    assert (_open_files(os.getpid()), _open_files(parent)) == before
    pool.close()
    assert _is_gone(parent)


def test_workers_end_with_their_parent() -> None:
    pool = WorkerPool(SCORER, LIMITS)
    pool.score([RIGHT])
    worker = pool._server.fork(1 << 30)
    worker.parent.kill()
    eventually(lambda: _is_gone(worker.pid), "the worker is still there")
    worker.channel.close()
    pool.close()


def test_a_scorer_that_cannot_be_made_is_named() -> None:
    for scorer, reason in (("tests.support.no_such:x", "No module named"), ("json:no_such", "no attribute")):
        with pytest.raises(RuntimeError, match=f"{scorer} did not start.*{reason}"):
            WorkerPool(scorer, LIMITS).score([RIGHT])
