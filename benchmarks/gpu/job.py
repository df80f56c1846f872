"""Runs benchmarks of this folder in one process that is a whole job: prints results as they come, JSON at the end."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_rpp import device
from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.device.gpus import gpus, package_version, software
from megatron_rpp.observability.files import write_whole
from megatron_rpp.parallel import bootstrap
from megatron_rpp.parallel.context import ParallelContext

ALL = ("logprobs", "ipc_sync", "train_step")  # the quick ones first
PACKAGES = ("torch", "megatron-core", "transformer-engine")


def main(*names: str) -> None:
    """Those benchmarks; all of them where none is named."""
    modules = {name: importlib.import_module(f"benchmarks.gpu.{name}") for name in names or ALL}
    args = arguments(modules)
    if not device.has_cuda() and not args.tiny:
        sys.exit("no CUDA GPU; --tiny runs the same on CPU, for its typos alone")
    modules = {name: module for name, module in modules.items() if name in args.only}
    found: dict[str, Any] = about()
    print("  ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    parallel, failed = bootstrap.initialize(ParallelConfig(), seed=0), False
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    try:
        with tempfile.TemporaryDirectory(prefix="benchmarks-gpu-") as scratch:
            for name, module in modules.items():
                found[name] = []
                failed |= not measured(
                    module, parallel, Path(scratch), args, found[name], lambda: keep(args.out, found)
                )
    finally:  # also of a run that its time limit ends
        print(json.dumps(found), flush=True)
        keep(args.out, found)
        bootstrap.shutdown()
    if failed:
        sys.exit("a benchmark has failed; its error is above")


def keep(out: Path | None, found: dict[str, Any]) -> None:
    """All that is known so far, as a file of JSON that is whole at any time."""
    if out is not None:
        write_whole(out, json.dumps(found))


def measured(
    module: Any,
    parallel: ParallelContext,
    folder: Path,
    args: argparse.Namespace,
    results: list[dict[str, Any]],
    then: Callable[[], None] = lambda: None,
) -> bool:
    """Add what `module` finds to `results`, print each as it comes, and call `then`. False where it failed: others go
    on."""
    try:
        for result in module.run(parallel, folder, args):
            results.append(result)
            print(module.line(result), flush=True)
            then()
    except Exception:
        traceback.print_exc()
        return False
    return True


def about() -> dict[str, str]:
    """Date, GPU and versions."""
    versions = {name: package_version(name) for name in PACKAGES}
    gpu = ", ".join(gpu.name for gpu in gpus()[:1]) or "CPU"
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": gpu,
        **software(),
        **{k: v for k, v in versions.items() if v},
    }


def arguments(modules: dict[str, Any], argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="\n\n".join(module.__doc__ for module in modules.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tiny", action="store_true", help="sizes that CPU takes: to run the code, not to measure")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default=",".join(modules), help=f"some of {', '.join(modules)}, with commas between")
    parser.add_argument("--out", type=Path, help="file for the JSON object, written after each result")
    for module in modules.values():
        module.add_arguments(parser)
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    if unknown := set(args.only) - modules.keys():
        parser.error(f"--only names {', '.join(sorted(unknown))}; there are {', '.join(modules)}")
    return args
