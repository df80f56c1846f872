"""A server that announces itself follows its job; a small program stands in SGLang's place, the store is a real one."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from fake_sglang import SPAWNED

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config, RunConfig, WeightSyncConfig
from megatron_rpp.parallel.environment import JobPlace
from megatron_rpp.parallel.rendezvous import open_store
from megatron_rpp.rollout.announced_server import AnnouncedServer
from megatron_rpp.rollout.job_store import JobOver, JobStore
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.rollout.registry import Entry, Registry
from megatron_rpp.rollout.sglang_server import SGLangServer
from tests.support.processes import child_at


class Job:
    """The trainer's side: a store, its file in run.dir, and a reader of the registry."""

    def __init__(self, run_dir: Path, attempt: str) -> None:
        self.file = run_dir / "rendezvous" / f"{attempt}.json"
        place = JobPlace(0, 1, 0, 1, "single", attempt, "here")
        self.store: dist.Store | None = open_store(place, str(run_dir), timedelta(seconds=10))
        self._registry: Registry | None = Registry(self.store, attempt, 30.0)

    def entries(self) -> tuple[Entry, ...]:
        assert self._registry is not None
        return self._registry.entries()

    def the_server(self, after: Entry | None = None) -> Entry:
        """The only one, once it is there and another than `after`."""
        seen: list[Entry] = []

        def is_there() -> bool:
            seen[:] = self.entries()  # once: what is listed now may be withdrawn before the next line
            return len(seen) == 1 and seen[0] != after

        until(is_there)
        return seen[0]

    def is_listed(self, entry: Entry) -> bool:
        return entry in self.entries()

    def die(self) -> None:
        """As by SIGKILL: its file stays."""
        self.store = self._registry = None


class Serving:
    """`rpp serve` without its command line, in a thread; `ending` is what it ended with."""

    def __init__(self, tmp_path: Path, attempt: str | None = None, **rollout: Any) -> None:
        settings = {"health_deadline_s": 2.0, "startup_deadline_s": 30.0, "restart_backoff_s": 0.1, "registry": True}
        sync = WeightSyncConfig(deadline_s=0.5)
        config = Config(run=RunConfig(str(tmp_path)), rollout=RolloutConfig(**settings | rollout), weight_sync=sync)
        self._log = tmp_path / "sglang.txt"

        def command(port: int) -> list[str]:
            return [sys.executable, "-c", SPAWNED, str(port), str(tmp_path / "broken")]

        def make(address: str) -> SGLangServer:
            return SGLangServer("", config.rollout, dtype="float32", log_path=self._log, host=address, command=command)

        jobs = JobStore(str(tmp_path), attempt, config.rollout.startup_deadline_s)
        self._server = AnnouncedServer(make, jobs, config, "here", None)
        self.ending: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._server.run()
        except BaseException as error:
            self.ending = error

    def join(self) -> BaseException | None:
        self._thread.join(20)
        assert not self._thread.is_alive(), "it serves on"
        return self.ending


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Callable[[str], Job]]:
    """Starts a job; at the end none is left, so that whoever serves ends, too."""
    before = {p.pid for p in psutil.Process().children()}
    with ExitStack() as stack:

        def start(attempt: str) -> Job:
            job = Job(tmp_path, attempt)
            stack.callback(lambda: job.file.unlink(missing_ok=True))
            return job

        yield start
    until(lambda: {p.pid for p in psutil.Process().children()} <= before)


def until(is_true: Callable[[], bool], timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def test_a_server_announces_itself_and_ends_with_the_run(tmp_path: Path, jobs: Callable[[str], Job]) -> None:
    serving = Serving(tmp_path)
    job = jobs("7.0")
    entry = job.the_server()
    process = child_at(entry.url)
    assert entry.host == "here" and entry.url.startswith("http://127.0.0.1:"), "a store on loopback has neighbours only"
    job.file.unlink()
    assert re.search(r"the run in run\.dir=.* has ended", str(serving.join()))
    assert isinstance(serving.ending, JobOver)
    assert not process.is_running() and job.entries() == ()


def test_a_server_that_dies_is_withdrawn_and_announced_anew(tmp_path: Path, jobs: Callable[[str], Job]) -> None:
    Serving(tmp_path)
    job = jobs("7.0")
    first = job.the_server()
    (program,) = child_at(first.url).children()
    program.kill()
    assert job.the_server(after=first).slot == first.slot + 1


def test_a_silent_server_is_killed_and_started_again(tmp_path: Path, jobs: Callable[[str], Job]) -> None:
    Serving(tmp_path)
    job = jobs("7.0")
    first = job.the_server()
    process = child_at(first.url)
    stopped_at = time.monotonic()
    os.killpg(process.pid, signal.SIGSTOP)
    until(lambda: not job.is_listed(first))
    assert time.monotonic() - stopped_at >= 2.0, "a sync may keep it from answering for so long"
    assert job.the_server(after=first).slot == first.slot + 1 and not process.is_running()


def test_when_the_job_is_started_again_the_running_server_is_announced_to_it(
    tmp_path: Path, jobs: Callable[[str], Job]
) -> None:
    Serving(tmp_path)
    first = jobs("7.0")
    entry = first.the_server()
    process = child_at(entry.url)
    first.die()
    second = jobs("7.1")
    assert second.the_server().url == entry.url
    assert process.is_running(), "it has the model loaded"


def test_only_the_attempt_that_it_was_started_for_is_served(tmp_path: Path, jobs: Callable[[str], Job]) -> None:
    serving = Serving(tmp_path, attempt="7.1", startup_deadline_s=2.0)
    other = jobs("7.0")
    assert "no job was found" in str(serving.join())
    assert other.entries() == ()


def test_without_a_job_nothing_is_started_and_it_ends_at_the_deadline(
    tmp_path: Path, jobs: Callable[[str], Job]
) -> None:
    left_behind = jobs("7.0")
    left_behind.die()  # its file stays
    start = time.monotonic()
    ending = Serving(tmp_path, startup_deadline_s=1.0).join()
    assert isinstance(ending, JobOver) and time.monotonic() - start >= 1.0
    assert re.search(r"no job was found .*startup_deadline_s=1 s: .*refused.*job 7\.0.* on host here", str(ending))
    assert not (tmp_path / "sglang.txt").exists(), "a server was started for nobody"


def test_a_server_that_cannot_start_is_an_error_with_the_end_of_its_log(
    tmp_path: Path, jobs: Callable[[str], Job]
) -> None:
    (tmp_path / "broken").touch()
    jobs("7.0")
    ending = Serving(tmp_path, max_retries=1).join()
    assert isinstance(ending, RolloutError) and "weights are corrupt" in str(ending)
    assert (tmp_path / "sglang.txt").read_text().count("weights are corrupt") == 2, "max_retries=1 is one more try"
