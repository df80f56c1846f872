"""Runs and interrupted runs for test_exact_resume.py, as forks of this process: a start costs a second.

python -m tests.integration.resume_worker COMMAND CONFIG.toml [ARGUMENT...]
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from megatron_rpp import session, session_parts, train
from megatron_rpp.config.load import load_config
from megatron_rpp.config.schema import Config
from megatron_rpp.experience.types import Rollout
from megatron_rpp.observability.logs import setup_logging
from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.observability.timers import Timers
from megatron_rpp.rollout.journal import journal_folder
from tests.support.forked_ranks import run_forked

PHASES = ("rollout", "reward", "score", "parity", "train", "sync", "eval", "save")
Doom = tuple[int, str, int, float]
"""(rank, phase, how often it enters the phase before it dies, seconds later)"""


class DigitReward:
    """The share of digits: a random model never ends with the right sum, and without reward nothing is learnt."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [sum(c.isdigit() for c in r.text) / len(r.response_ids) for r in rollouts]

    def metrics(self) -> Metrics:
        return Metrics()

    def start(self) -> None: ...

    def close(self) -> None: ...


class FatalTimers(Timers):
    """Ends this process some time after it has entered a phase for the nth time."""

    def __init__(self, phase: str, times: int, delay_s: float) -> None:
        super().__init__()
        self._phase, self._left, self._delay_s = phase, times, delay_s

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._left -= name == self._phase
        if name == self._phase and self._left == 0:
            threading.Timer(self._delay_s, die).start()
        with super().__call__(name):
            yield


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(config: Config, resume: session.Resume, doom: Doom | None = None) -> None:
    """One rank, as `rpp train` runs it."""
    setup_logging(config.run.dir, rank := int(os.environ["RANK"]))
    if doom is not None and doom[0] == rank:
        timers = FatalTimers(*doom[1:])
        session.Timers = lambda: timers  # type: ignore[assignment,misc]
    train.run(config, resume=resume)


def start(config: Config, resume: session.Resume, doom: Doom | None = None) -> list[int]:
    """The ranks' exit codes."""
    world_size = config.parallel.tensor * config.parallel.pipeline * config.parallel.data
    return run_forked(world_size, partial(run, config, resume, doom), Path(config.run.dir) / "stderr")


def interrupted(config: Config, kills: int) -> None:
    """Kill the run `kills` times, in every phase at least once, then let it end."""
    seeded = random.Random(5)
    phases = [*PHASES, *seeded.choices(PHASES, k=kills - len(PHASES))]
    seeded.shuffle(phases)
    for phase in phases:
        doom = (seeded.randint(0, 1), phase, 1 if phase == "eval" else seeded.randint(1, 3), seeded.uniform(0.0, 0.1))
        codes = start(config, "auto", doom)
        assert codes[doom[0]] == -signal.SIGKILL, f"{doom}: ended with {codes}, not killed"
    finish(config)


def killed_in_rollout(config: Config, prompts: int) -> None:
    """Kill rank 0 in its first step once `prompts` are in its journal; keep what it had then; then let it end."""
    journal = journal_folder(config.run.dir) / "version-000000.replica-0.jsonl"

    def watched() -> None:
        threading.Thread(target=_die_when, args=(lambda: _lines(journal) >= prompts,), daemon=True).start()
        run(config, "no")

    codes = run_forked(config.parallel.data, watched, Path(config.run.dir) / "stderr")
    assert -signal.SIGKILL in codes, f"ended with {codes}, not killed"
    journal.with_suffix(".before").write_bytes(journal.read_bytes())
    with journal.open("ab") as file:
        file.write(b'{"key": "torn')  # as a kill in the middle of a line leaves it
    finish(config)


def _die_when(is_due: Callable[[], bool]) -> None:
    while not is_due():
        threading.Event().wait(0.005)
    die()


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def finish(config: Config) -> None:
    codes = start(config, "auto")
    assert not any(codes), f"the run ended with {codes}"


def main() -> None:
    command, file, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    session_parts.build_reward = lambda *_, **others: DigitReward()  # type: ignore[assignment,return-value]
    if command == "killed_in_rollout":
        return killed_in_rollout(load_config([file], []), int(rest[0]))
    if command == "interrupted":
        return interrupted(load_config([file], rest[1:]), int(rest[0]))
    finish(load_config([file], rest))
    return None


if __name__ == "__main__":
    main()
