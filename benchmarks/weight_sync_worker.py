"""One trainer rank of the weight-sync benchmark: `speed` (one rank) or `memory` (any number of ranks).

    python -m benchmarks.weight_sync_worker TASK RESULT.json REPEATS --section.key=value ...

Started by benchmarks/weight_sync.py. A first sync of each kind, which joins groups and warms everything up,
is not counted.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.weight_sync_plain import PlainTransfers
from megatron_rpp.config.deadlines import longest_wait_s
from megatron_rpp.config.load import load_config
from megatron_rpp.config.schema import Config
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.model.export_hf import entries_of
from megatron_rpp.model.shards import sharded_parameters
from megatron_rpp.model.stage_export import StageExport
from megatron_rpp.observability.logs import setup_logging
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.collectives import gather_objects
from megatron_rpp.parallel.context import ParallelContext
from megatron_rpp.rollout.fleet import ServerFleet
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.weight_sync.build import build_engine, export_dtype
from megatron_rpp.weight_sync.export import payload_bytes, plan_buckets
from megatron_rpp.weight_sync.synced_engine import SyncedRolloutEngine

Result = dict[str, Any]
_M_MMAP_THRESHOLD = -3  # of malloc.h


@dataclass(frozen=True)
class Rank:
    """This rank's place, with the servers beside it."""

    config: Config
    parallel: ParallelContext
    fleet: ServerFleet | None
    stack: ExitStack

    def engine(self, policy: Model, **weight_sync: Any) -> SyncedRolloutEngine:
        """A ready engine for `policy`. weight_sync: what it has otherwise than the configuration.

        Two engines at a time are for a job of one rank: their exchanges share their keys.
        """
        config = replace(self.config, weight_sync=replace(self.config.weight_sync, **weight_sync))
        client = SGLangClient((), config.rollout, decode=lambda token_ids: "")
        engine = build_engine(config, policy, self.fleet, client)
        self.stack.callback(engine.close)
        engine.wait_ready()
        return engine


@contextmanager
def open_rank(config: Config) -> Iterator[Rank]:
    """Join the job and start its server. Warnings of Megatron and torch go to the rank's log file."""
    setup_logging(config.run.dir, int(os.environ["RANK"]))
    parallel = bootstrap.initialize(config.parallel, config.run.seed, longest_wait_s(config))
    with ExitStack() as stack:
        stack.callback(bootstrap.shutdown)
        fleet = ServerFleet(config) if parallel.rank == 0 else None
        if fleet is not None:
            stack.callback(fleet.stop)
        yield Rank(config, parallel, fleet, stack)


def main() -> None:
    task, out, repeats, *overrides = sys.argv[1:]
    with open_rank(load_config([], overrides)) as rank:
        policy = build_model(rank.config, rank.parallel, path=rank.config.model.path)
        result = {"speed": speed, "memory": memory}[task](rank, policy, int(repeats))
        if rank.parallel.rank == 0:
            Path(out).write_text(json.dumps(result))


def speed(rank: Rank, policy: Model, repeats: int) -> Result:
    """Syncs with and without verification, a plain broadcast and a plain copy, in turns: seconds, one a repeat."""
    engines = {verify: rank.engine(policy, verify=verify) for verify in ("off", "full")}
    sizes = bucket_sizes(policy, rank.config)
    found: dict[str, list[Result]] = {verify: [] for verify in engines}
    plain: dict[str, list[float]] = {"broadcast": [], "copy": []}
    receivers = rank.config.rollout.num_servers * rank.config.rollout.server_tensor
    with PlainTransfers(sizes, Path(rank.config.run.dir) / "plain", receivers) as transfers:
        for version in range(repeats + 1):
            plain["broadcast"].append(transfers.broadcast_s())
            plain["copy"].append(transfers.copy_s())
            for number, (verify, engine) in enumerate(engines.items()):
                found[verify].append(timed_sync(engine, 2 * version + number))
    return {
        "bytes": sum(sizes),
        "buckets": len(sizes),
        "largest_bucket": max(sizes),
        "largest_parameter": largest_parameter(policy),
        "plain": {name: seconds[1:] for name, seconds in plain.items()},
        "syncs": {verify: reports[1:] for verify, reports in found.items()},
    }


def memory(rank: Rank, policy: Model, repeats: int) -> Result:
    """By how many bytes each rank's resident set rises in a sync; the largest of the repeats, by rank.

    Memory is given back as soon as it is freed, so that what is resident is what is held: glibc would keep up to twice
    the largest freed block below 32 MiB, now more and now less.
    """
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
    engine = rank.engine(policy)
    peaks = [peak_of_sync(engine, version) for version in range(repeats + 1)]
    return {"peak_bytes": gather_objects(max(peaks[1:])), "largest_parameter": largest_parameter(policy)}


def timed_sync(engine: SyncedRolloutEngine, version: int) -> Result:
    """One sync: its report, and `wall_s` of the whole call."""
    started = time.perf_counter()
    engine.sync(version)
    seconds = time.perf_counter() - started
    assert engine.last_sync is not None
    return {**asdict(engine.last_sync), "wall_s": seconds}


def peak_of_sync(engine: SyncedRolloutEngine, version: int) -> int:
    """By how many bytes this rank's resident set rises in one sync."""
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier sync has freed is no part of the level
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = _resident("VmRSS")
    engine.sync(version)
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def bucket_sizes(policy: Model, config: Config) -> list[int]:
    """Bytes of each bucket that the broadcast transport will send."""
    export = StageExport(policy, export_dtype(config, policy.hf))
    largest = payload_bytes(export, config.weight_sync.bucket_mb * 2**20, flatten=False)
    return [sum(entry.nbytes for entry in run) for run in plan_buckets(entries_of(export.empty()), largest)]


def largest_parameter(policy: Model) -> int:
    """Bytes of the largest one, gathered over TP."""
    parts = sharded_parameters(policy.chunks)
    return max(p.parameter.nbytes * (1 if p.dim is None else policy.parallel.tp_size) for p in parts)


if __name__ == "__main__":
    main()
