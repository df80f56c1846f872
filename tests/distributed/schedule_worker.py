"""A rank of one of two replicas that collect steps in every mode, from servers of this process that fail at random.

Arguments: a folder, in which each mode has a run directory; steps; further keys of `parallel` as JSON; modes, or all.
The servers are real HTTP servers, the policy has no weights.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_rpp.collect import collect
from megatron_rpp.config.fields import build
from megatron_rpp.config.schema import Config
from megatron_rpp.data.prompt_source import PromptSource
from megatron_rpp.experience.types import Prompt, Rollout
from megatron_rpp.observability.reporter import Reporter
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.collectives import gather_objects
from megatron_rpp.rollout.fleet import Server
from megatron_rpp.rollout.journal import open_journal
from megatron_rpp.rollout.probe import ServerInfo
from megatron_rpp.rollout.protocol import SamplingParams
from megatron_rpp.rollout.schedule import scheduler
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.rollout.shared_load import SharedLoad
from megatron_rpp.weight_sync.synced_engine import SyncedRolloutEngine
from tests.unit.rollout.fake_sglang import STOP, FakeServer, Reply, running, samples_of

STEPS, PROMPTS, SAMPLES = 50, 37, 2
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "over_sampling": {"schedule.over_sampling": 1.5},
    "dynamic_sampling": {"schedule.dynamic_sampling": True},
    "time_budget": {"schedule.time_budget_s": 0.05},
    "token_budget": {"schedule.token_budget": 20},
    "all": {
        "schedule.over_sampling": 1.5,
        "schedule.dynamic_sampling": True,
        "schedule.time_budget_s": 0.2,
        "schedule.token_budget": 40,
        "rollout.record": "off",
    },
}

_REQUESTS = count(1)  # of all modes, each of which has every fault


class Fleet:
    """Rank 0's; a server that is doubted comes back without weights, as one that was started again."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._versions = dict.fromkeys(urls, -1)

    def refresh(self, suspects: Collection[str] = ()) -> tuple[Server, ...]:
        self._versions |= {url: -1 for url in suspects if url in self._versions}
        return tuple(Server(url, ServerInfo(1, "cpu"), version) for url, version in self._versions.items())

    def mark(self, urls: Collection[str], version: int) -> None:
        self._versions |= dict.fromkeys(urls, version)


class Engine(SyncedRolloutEngine):
    """A sync tells the servers nothing but the version."""

    def _bring(self, servers: Sequence[Server], version: int) -> None:
        self._fleet.mark(servers, version)

    def _try_newcomers(self, servers: Sequence[Server]) -> None:
        self._bring(servers, self.policy_version)


class Reward:
    """What a prompt earns depends on it alone: some are always solved, some never."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [float(r.prompt.id % 5 != 0 and (r.prompt.id % 5 == 1 or i % 2)) for i, r in enumerate(rollouts)]


def misbehave(server: FakeServer, seed: int, version: Sequence[int]) -> None:
    """Resets, errors, too few samples, other weights, and a whole server that is silent for longer than it may."""
    chance = random.Random(seed)

    def answer(path: str, payload: dict[str, Any]) -> Reply:
        time.sleep(chance.choice((0.0, 0.005, 0.02, 0.06)))
        number, now = next(_REQUESTS), version[0]
        if number % 41 == 0:
            raise ConnectionAbortedError
        if number % 37 == 0:
            return 503, "busy"
        if number % 97 == 0:
            return 200, samples_of(payload)[:1]
        if number % 113 == 0:
            return 200, samples_of(payload, weight_version=str(now - 1))
        if number % 211 == 0:
            server.stopped.set()
            threading.Timer(1.1, server.stopped.clear).start()
        return 200, samples_of(payload, weight_version=str(now))

    server.answer = answer


def run_mode(parallel: Any, servers: Sequence[FakeServer], version: list[int], config: Config) -> dict[str, Any]:
    client = SGLangClient((), config.rollout, lambda ids: "")
    client.shared = SharedLoad(parallel.store)
    fleet: Any = Fleet([server.url for server in servers]) if servers else None
    policy: Any = SimpleNamespace(parallel=parallel)
    engine = Engine(policy, fleet, client, (), config, None, open_journal(config, parallel))
    prompts = [Prompt(i, "", (i, 7), "") for i in range(PROMPTS)]
    source = PromptSource(prompts, config.rollout.num_prompts, seed=1)
    reporter = Reporter(config.run.dir, rank=parallel.rank, replica=parallel.dp_rank, steps=range(config.run.steps))
    session: Any = SimpleNamespace(
        config=config,
        parallel=parallel,
        prompt_source=source,
        rollout_engine=engine,
        reward=Reward(),
        reporter=reporter,
        sampling=lambda step: SamplingParams(SAMPLES, 8, 1.0, 1.0, (STOP,), seed=step),
    )
    saved, crashes, totals = source.state_dict(), random.Random(7), dict[str, float]()
    for step in range(config.run.steps):
        version[0] = step
        for is_last_try in (crashes.random() > 0.2, True):
            session.prompt_source = PromptSource(prompts, config.rollout.num_prompts, seed=1)
            session.prompt_source.load_state_dict(saved)
            engine.sync(step)
            collected = collect(session, step)
            if is_last_try:  # else the job is killed before it has saved
                break
        saved = json.loads(json.dumps(session.prompt_source.state_dict()))
        assert len({json.dumps(state) for state in gather_objects(saved)}) == 1, "the ranks' sources differ"
        held = gather_objects((parallel.dp_rank, [(r.group_id, r.response_ids) for r in collected.rollouts]))
        assert all(own == theirs for i, own in held for j, theirs in held if i == j), "a replica's ranks differ"
        rewards = collected.rewards or session.reward(collected.rollouts)
        metrics = {key: value for key, value in collected.metrics.items() if key.startswith("rollout/")}
        totals = {key: totals.get(key, 0.0) + value for key, value in metrics.items()}
        reporter.step(step, {"policy_version": step, **metrics}, collected.rollouts, rewards, collected.skipped)
    reporter.__exit__(None, None, None)
    return {"source": saved, "totals": totals}


def main() -> None:
    out, steps, layout = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    modes = sys.argv[4:] or list(MODES)
    scheduler._POLL_S = 0.02
    results: dict[str, Any] = {}
    for mode in modes:
        config = build(
            {
                "run.dir": str(out / mode),
                "run.steps": steps,
                "parallel.data": 2,
                **{f"parallel.{key}": size for key, size in layout.items()},
                "rollout.num_prompts": 6,
                "rollout.urls": ("http://127.0.0.1:1",),
                "rollout.health_deadline_s": 0.5,
                "rollout.max_retries": 12,
                "algorithm.num_samples_per_prompt": SAMPLES,
                "train.batch_size": 4,
                **MODES[mode],
            }
        )
        if not results:
            parallel = bootstrap.initialize(config.parallel, 0)
        version = [0]
        with ExitStack() as stack:
            servers = [stack.enter_context(running()) for _ in range(2 if parallel.rank == 0 else 0)]
            for seed, server in enumerate(servers):
                misbehave(server, seed, version)
            results[mode] = run_mode(parallel, servers, version, config)
    if parallel.rank == 0:
        (out / "result.json").write_text(json.dumps(results))
    bootstrap.shutdown()


if __name__ == "__main__":
    main()
