"""One rank of a short run, and what the test must see from inside: greedy tokens, a kill, exported weights."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from megatron_rpp.config.load import load_config
from megatron_rpp.experience.types import Rollout
from megatron_rpp.model.save_hf import save_hf
from megatron_rpp.observability.logs import setup_logging
from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.parallel.rank_process import exit_on_sigterm
from megatron_rpp.rollout import control
from megatron_rpp.rollout.http import post_json
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.session import Session, open_session
from megatron_rpp.train import train_on_one_batch


def main() -> None:
    config = load_config([sys.argv[1]], [])
    out = Path(sys.argv[2])
    exit_on_sigterm()
    setup_logging(config.run.dir, int(os.environ["RANK"]))
    with open_session(config, resume="no") as opened:
        session = replace(opened, reward=DigitReward())
        before = greedy(session)
        refusal = leave_update_session_open(session)
        train_on_one_batch(session, 0)
        kill = KillServerOnce() if session.parallel.rank == 0 else None
        if kill is not None:
            session.reporter.progress = kill  # type: ignore[method-assign]
        train_on_one_batch(session, 1)
        after = greedy(session)
        save_hf(session.policy, config.model.path, str(out / "trained"))
        if kill is not None:
            result = {"before": before, "after": after, "killed": kill.pid, "server_pids": server_pids()}
            result["second_begin"] = refusal
            (out / "result.json").write_text(json.dumps(result))


def leave_update_session_open(session: Session) -> str:
    """As a trainer does that is killed in the middle of a sync. What the server says to another one that begins."""
    if session.parallel.rank == 0:
        (url,) = session.rollout_engine._client.urls
        control.begin_update(url, 30.0)
        try:
            post_json(url, "begin_weight_update", {}, 30.0)
        except RolloutError as error:
            return str(error)
    return ""


def greedy(session: Session) -> list[list[int]]:
    sampling = replace(session.sampling(0), num_samples_per_prompt=1, temperature=0.0, max_response_tokens=6)
    return [list(r.response_ids) for r in session.rollout_engine.generate(session.eval_prompts, sampling)]


class DigitReward:
    """The share of digits: a random model never ends with the right sum, and without reward nothing is learnt."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [sum(c.isdigit() for c in r.text) / len(r.response_ids) for r in rollouts]

    def metrics(self) -> Metrics:
        return Metrics()

    def close(self) -> None: ...


class KillServerOnce:
    """A progress callback that kills the SGLang server as soon as the first responses are in."""

    pid: int | None = None

    def __call__(self, done: int, asked: int) -> None:
        if self.pid is None:
            (self.pid,) = server_pids()
            os.kill(self.pid, signal.SIGKILL)


def server_pids() -> list[int]:
    """The SGLang server that this rank has spawned."""
    children = psutil.Process().children()
    return [c.pid for c in children if "sglang.launch_server" in " ".join(c.cmdline())]


if __name__ == "__main__":
    main()
