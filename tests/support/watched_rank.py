"""Small ranks under a watchdog: torch and gloo alone, forked from a server that has them imported."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from megatron_rpp.config.job import WatchdogConfig
from megatron_rpp.parallel import stop_request
from megatron_rpp.parallel.environment import JobPlace
from megatron_rpp.parallel.failures import Failure, causes
from megatron_rpp.parallel.watchdog import Watchdog

ATTEMPT = "7.0.0"
DEADLINE_S = 3.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])


class Job:
    """`with Job(work, 3, tmp_path) as job:` runs `work(dog, rank, folder)` on three ranks, two to a node."""

    def __init__(
        self,
        work: Callable[[Watchdog, int, Path], None],
        world_size: int,
        folder: Path,
        *,
        deadline_s: float = DEADLINE_S,
        stall_s: float = 600.0,
    ) -> None:
        self.folder = folder
        config = WatchdogConfig(heartbeat_deadline_s=deadline_s, stall_deadline_s=stall_s)
        self._port, port_of_0 = _CONTEXT.Pipe(duplex=False)
        self.ranks: list[BaseProcess] = []
        self._start = lambda rank, port: _CONTEXT.Process(
            target=_rank, args=(work, rank, world_size, folder, config, port)
        )
        self.ranks.append(self._start(0, port_of_0))
        self.ranks[0].start()
        port_of_0.close()
        port = self._port.recv()
        for rank in range(1, world_size):
            self.ranks.append(self._start(rank, port))
            self.ranks[rank].start()

    def wait_ready(self) -> None:
        """Until every rank has marked that it is at work."""
        deadline = time.monotonic() + 60
        while not all((self.folder / f"ready-{rank}").exists() for rank in range(len(self.ranks))):
            assert time.monotonic() < deadline, "the ranks have not started"
            time.sleep(0.02)

    def send(self, rank: int, number: signal.Signals) -> None:
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def codes(self, *ranks: int, within_s: float) -> list[int | None]:
        """Exit codes (-N by signal N) of these ranks, or of all, at most `within_s` from now; None: still there."""
        wanted = ranks or tuple(range(len(self.ranks)))
        deadline = time.monotonic() + within_s
        for rank in wanted:
            self.ranks[rank].join(max(0.0, deadline - time.monotonic()))
        return [self.ranks[rank].exitcode for rank in wanted]

    def causes(self) -> list[Failure]:
        return causes(self.folder, ATTEMPT)

    def log(self, rank: int) -> str:
        return (self.folder / "logs" / f"rank-{rank}.txt").read_text()

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()


def _rank(
    work: Callable[[Watchdog, int, Path], None], rank: int, world_size: int, folder: Path, config: WatchdogConfig, port
) -> None:
    stop_request.listen({})
    torch.set_num_threads(1)
    sys.stderr = sys.__stderr__ = open(folder / f"stderr-{rank}", "w", buffering=1)  # noqa: SIM115 # for its life
    os.dup2(sys.stderr.fileno(), 2)
    store = dist.TCPStore(
        "127.0.0.1", 0 if rank == 0 else port, None, rank == 0, timedelta(seconds=60), wait_for_workers=False
    )
    if rank == 0:
        port.send(store.port)
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=world_size, timeout=timedelta(seconds=300)
    )
    place = JobPlace(rank, world_size, rank % 2, min(2, world_size), "slurm", ATTEMPT, f"node{rank // 2}")
    with Watchdog(store, place, folder, config) as dog, dog.telling():
        work(dog, rank, folder)


def ready(rank: int, folder: Path) -> None:
    (folder / f"ready-{rank}").touch()


def reduce() -> None:
    """A collective that ends only when every rank has come to it."""
    dist.all_reduce(torch.ones(1))


def work_on(dog: Watchdog, rank: int, folder: Path) -> None:
    """Steps with a collective in each, for ever."""
    reduce()
    ready(rank, folder)
    while True:
        reduce()
        time.sleep(0.05)


def idle(dog: Watchdog, rank: int, folder: Path) -> None:
    """Nothing that would notice a dead rank, but the watchdog."""
    ready(rank, folder)
    time.sleep(600)


def end(dog: Watchdog, rank: int, folder: Path) -> None:
    """Ranks that come to their end one after another."""
    time.sleep(0.7 * rank)


def fail_while_others_wait(dog: Watchdog, rank: int, folder: Path) -> None:
    if rank == 1:
        raise RuntimeError("boom on purpose")
    reduce()


def refuse(dog: Watchdog, rank: int, folder: Path) -> None:
    """A user's mistake that all but rank 0 see."""
    if rank:
        raise ValueError("data.train.path must\nbe there")
    reduce()


def hang_in_a_phase(dog: Watchdog, rank: int, folder: Path) -> None:
    for _ in range(3):
        with dog.phase("score", deadline_s=60.0):  # has time of its own
            time.sleep(0.7)
    with dog.phase("train"):
        reduce() if rank else time.sleep(600)


def be_slow(dog: Watchdog, rank: int, folder: Path) -> None:
    """Longer than the deadline: rank 0 waits, rank 1 computes in Python, rank 2 in C."""
    deadline = time.monotonic() + 4
    while rank == 1 and time.monotonic() < deadline:
        sum(range(10_000))
    if rank == 2:
        matrix = torch.ones(1500, 1500)
        while time.monotonic() < deadline:
            matrix @ matrix
    reduce()


def hold_the_gil(dog: Watchdog, rank: int, folder: Path) -> None:
    ready(rank, folder)
    if rank == 1:
        ctypes.PyDLL(None).sleep(600)
    time.sleep(600)


def step_until_asked(dog: Watchdog, rank: int, folder: Path) -> None:
    """Each rank notes the step at which it stopped."""
    for step in range(10_000):
        reduce()
        ready(rank, folder)
        time.sleep(0.02)
        asked: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(asked, stop_request.is_requested())
        if any(asked):
            (folder / f"stopped-{rank}").write_text(str(step))
            return
