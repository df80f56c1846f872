"""One rank of a trainer that syncs many weights to running servers, from one layout after the other.

Arguments: a JSON file with `Job`s, and a folder where rank 0 notes for each sync what the servers then report.
One launch for all: importing torch and Megatron takes longer than the syncs.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config, ModelConfig, ParallelConfig, WeightSyncConfig
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.model.load_hf import load_hf_weights
from megatron_rpp.observability.logs import setup_logging
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.context import ParallelContext
from megatron_rpp.parallel.rank_process import exit_on_sigterm
from megatron_rpp.rollout import control
from megatron_rpp.rollout.fleet import ServerFleet
from megatron_rpp.rollout.http import get_json
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.weight_sync.build import build_engine
from megatron_rpp.weight_sync.synced_engine import SyncedRolloutEngine
from tests.support.layouts_in_turn import take_layout

DEADLINE_S = 60.0


@dataclass(frozen=True)
class Job:
    """The weights of `paths` (Hugging Face directories) to the servers at `urls`, one engine for all of them."""

    name: str
    layout: ParallelConfig
    urls: tuple[str, ...]
    paths: tuple[str, ...]
    sync: dict[str, Any]  # of WeightSyncConfig

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Job:
        tuples = {name: tuple(fields[name]) for name in ("urls", "paths")}
        return cls(**{**fields, **tuples, "layout": ParallelConfig(**fields["layout"])})

    def config(self) -> Config:
        sync = {"deadline_s": DEADLINE_S, "bucket_mb": 1} | self.sync
        return Config(
            model=ModelConfig(path=self.paths[0]),
            parallel=self.layout,
            rollout=RolloutConfig(urls=self.urls, startup_deadline_s=DEADLINE_S, max_retries=0),
            weight_sync=WeightSyncConfig(**{**sync, "transports": tuple(sync["transports"])}),
        )


def write_jobs(jobs: list[Job], path: Path) -> None:
    path.write_text(json.dumps([asdict(job) for job in jobs]))


def main() -> None:
    jobs = [Job.from_json(fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    out = Path(sys.argv[2])
    exit_on_sigterm()
    setup_logging(str(out), int(os.environ["RANK"]))
    first = bootstrap.initialize(jobs[0].layout, seed=0)
    for job in jobs:
        run(job, first, out)
    bootstrap.shutdown()


def run(job: Job, first: ParallelContext, out: Path) -> None:
    """All syncs of `job`, as versions 0, 1, ..."""
    config = job.config()
    # An exchange numbers its keys from 1, so that every engine needs a store of its own.
    parallel = take_layout(job.name, job.layout, first)
    policy = build_model(config, parallel, path=job.paths[0])
    fleet = ServerFleet(config) if parallel.rank == 0 else None
    engine = build_engine(config, policy, fleet, SGLangClient((), config.rollout, decode=lambda ids: ""))
    engine.wait_ready()
    for version, path in enumerate(job.paths):
        if version:
            load_hf_weights(policy.chunks, policy.hf, path, parallel, dtype=policy.config.params_dtype)
        engine.sync(version)
        note(job, version, policy, engine, out)
    for transport in engine._transports:
        transport.close()


def note(job: Job, version: int, policy: Model, engine: SyncedRolloutEngine, out: Path) -> None:
    """What the servers report of themselves, asked by nobody who has predicted it."""
    differing = engine.verify_weights() if job.sync.get("verify") != "off" else []
    if policy.parallel.rank == 0:
        assert engine.last_sync is not None
        checksums = {url: [r["checksums"] for r in control.checksums(url, (), DEADLINE_S)] for url in job.urls}
        paths = {url: get_json(url, "model_info", DEADLINE_S).get("model_path") for url in job.urls}
        report = {"checksums": checksums, "differing": differing, "model_paths": paths, **asdict(engine.last_sync)}
        (out / f"{job.name}-{version}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
