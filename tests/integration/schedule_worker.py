"""One rank that takes its steps while SGLang servers are killed. Arguments: its configuration, kills, a result file."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from megatron_rpp.config.load import load_config
from megatron_rpp.experience.types import Rollout
from megatron_rpp.observability.logs import setup_logging
from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.parallel.rank_process import exit_on_sigterm
from megatron_rpp.session import Session, open_session
from megatron_rpp.train import train_on_one_batch
from tests.support.processes import child_at


class ParityReward:
    """By the first token: about half of the groups of two earn the same."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [float(r.response_ids[0] % 2) for r in rollouts]

    def metrics(self) -> Metrics:
        return Metrics()

    def close(self) -> None: ...


class Killer:
    """A progress callback that kills one of the serving servers at random moments."""

    def __init__(self, session: Session, kills: int) -> None:
        self._session, self._random = session, random.Random(3)
        steps = range(2, session.config.run.steps - 2)
        self._due = set(self._random.sample(steps, kills))
        self.step, self.killed = 0, 0

    def __call__(self, done: int, asked: int) -> None:
        urls = self._session.rollout_engine._client.urls
        if self.step in self._due and done >= asked * self._random.choice((0, 0.25, 0.5)):
            self._due.discard(self.step)
            self.killed += 1
            os.killpg(os.getpgid(child_at(self._random.choice(urls)).pid), signal.SIGKILL)


def main() -> None:
    config = load_config([sys.argv[1]], [])
    exit_on_sigterm()
    setup_logging(config.run.dir, 0)
    with open_session(config, resume="no") as opened:
        session = replace(opened, reward=ParityReward())
        killer = Killer(session, kills=int(sys.argv[2]))
        session.reporter.progress = killer  # type: ignore[method-assign]
        for killer.step in range(config.run.steps):
            train_on_one_batch(session, killer.step)
        result = {"source": session.prompt_source.state_dict(), "killed": killer.killed}
    result["left"] = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    Path(sys.argv[3]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
