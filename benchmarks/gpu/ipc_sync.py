"""Weight sync by CUDA IPC to another process on the same GPU, against a copy of the same bytes on the device.

    python -m benchmarks.gpu.ipc_sync [--tiny] [--sync-model llama-1b] [--repeats 3]

The receiver (benchmarks/gpu/ipc_receiver.py) does what an engine does with a bucket: it opens the handle and copies
each tensor into memory of its own. A sync is the whole of it, verification apart (weight_sync.verify=off): pause,
gather, buckets, version. `rate_of_copy` is the rate of a sync over that of `tensor.copy_`. On CPU, where there are no
handles, the requests carry the bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import random_model, shape
from benchmarks.gpu.receiving import receiver
from benchmarks.gpu.timing import measure
from megatron_rpp.config.schema import Config, ModelConfig, RolloutConfig, WeightSyncConfig
from megatron_rpp.parallel.context import ParallelContext
from megatron_rpp.rollout.fleet import ServerFleet
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.weight_sync.build import build_engine

Result = dict[str, Any]


def run(parallel: ParallelContext, folder: Path, args: argparse.Namespace) -> Iterator[Result]:
    """One result."""
    name = "tiny" if args.tiny else args.sync_model
    with receiver("benchmarks.gpu.ipc_receiver") as url:
        config = Config(
            model=ModelConfig(
                path=str(folder / name), dtype="bfloat16", layer_spec="local" if args.tiny else "te", vocab_divisor=128
            ),
            rollout=RolloutConfig(urls=(url,)),
            weight_sync=WeightSyncConfig(transports=("ipc",), verify="off"),
        )
        config = replace(config, run=replace(config.run, dir=str(folder)))
        policy = random_model(shape(name, folder), config, parallel)
        fleet = ServerFleet(config)
        engine = build_engine(config, policy, fleet, SGLangClient((), config.rollout, decode=lambda ids: ""))
        try:
            engine.wait_ready()
            versions = count()
            sync = measure(lambda: engine.sync(next(versions)), repeats=args.repeats)
        finally:
            engine.close()
            fleet.stop()
    report = engine.last_sync
    assert report is not None and report.transport == "ipc"
    copy = copy_seconds(report.sent_bytes, parallel.device, args.repeats)
    yield {
        "model": name,
        "bytes": report.sent_bytes,
        "seconds": sync.seconds,
        "send_s": report.send_s,
        "copy_seconds": copy,
        "gb_per_s": report.sent_bytes / 1e9 / sync.seconds,
        "rate_of_copy": copy / sync.seconds,
    }


def copy_seconds(size: int, here: torch.device, repeats: int) -> float:
    """Of `size` bytes from one place on the device to another."""
    source, target = (torch.ones(size, dtype=torch.uint8, device=here) for _ in range(2))
    return measure(lambda: target.copy_(source), repeats=repeats).seconds


def line(found: Result) -> str:
    """A row of the table."""
    rate = f"{found['gb_per_s']:.1f} GB/s, {found['rate_of_copy']:.1%} of a copy on the device"
    return f"sync by IPC, {found['model']}: {found['bytes'] / 1e9:.2f} GB in {found['seconds']:.3f} s, {rate}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sync-model", default="llama-1b")


if __name__ == "__main__":
    from benchmarks.gpu.job import main

    main("ipc_sync")
