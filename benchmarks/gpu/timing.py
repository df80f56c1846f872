"""Seconds and peak memory of what runs on this rank's device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_rpp.device.gpus import gpus, package_version, software
from megatron_rpp.device.memory import forget_peak, memory_use, wait_for_device

# Dense bfloat16 FLOP/s that the makers give, by a part of the GPU's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


@dataclass(frozen=True)
class Measured:
    """Of one function."""

    seconds: float  # median of the runs
    peak_bytes: int  # above what was held before; 0 on CPU, where nothing keeps account


def measure(run: Callable[[], object], *, repeats: int, warm_up: int = 1) -> Measured:
    """`run()` to its end on the device, `repeats` times behind `warm_up` others."""
    for _ in range(warm_up):
        run()
    wait_for_device()
    forget_peak()
    before, seconds = memory_use(), []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        wait_for_device()
        seconds.append(time.perf_counter() - started)
    after = memory_use()
    peak = after.peak - before.held if before is not None and after is not None else 0
    return Measured(statistics.median(seconds), peak)


def peak_flops() -> float | None:
    """Of this rank's GPU in bfloat16, by its name; None where it is not known."""
    names = [gpu.name for gpu in gpus()]
    return next((flops for name in names[:1] for part, flops in PEAKS.items() if part in name), None)


def recipes() -> tuple[str, ...]:
    """Of fp8.recipe, those that this rank's GPU runs with the CUDA and Transformer Engine here; none on CPU."""
    from megatron_rpp.config.fp8_recipes import RULES, why_not

    cuda, engine = software().get("CUDA", ""), package_version("transformer-engine")
    return tuple(
        name
        for name in RULES
        for gpu in gpus()[:1]
        if not why_not(name, gpu.name, gpu.capability, cuda=cuda, engine=engine)
    )
