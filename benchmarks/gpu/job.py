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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rpp import device
from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.device.gpus import gpus, package_version, software
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
    found: dict[str, Any] = about()
    print("  ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    parallel, failed = bootstrap.initialize(ParallelConfig(), seed=0), False
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    try:
        with tempfile.TemporaryDirectory(prefix="benchmarks-gpu-") as scratch:
            for name, module in modules.items():
                found[name] = []
                failed |= not measured(module, parallel, Path(scratch), args, found[name])
    finally:  # also of a run that its time limit ends
        print(json.dumps(found), flush=True)
        bootstrap.shutdown()
    if failed:
        sys.exit("a benchmark has failed; its error is above")


def measured(
    module: Any, parallel: ParallelContext, folder: Path, args: argparse.Namespace, results: list[dict[str, Any]]
) -> bool:
    """Add what `module` finds to `results`, and print each as it comes. False where it failed: others go on."""
    try:
        for result in module.run(parallel, folder, args):
            results.append(result)
            print(module.line(result), flush=True)
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
    for module in modules.values():
        module.add_arguments(parser)
    return parser.parse_args(argv)
