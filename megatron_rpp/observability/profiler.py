"""Traces, memory snapshots and NVTX ranges of chosen steps (section `profile`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from megatron_rpp import device
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.performance import ProfileConfig
from megatron_rpp.device.profiling import activities, memory_history, nsys_capture, nvtx_range


class Profiler:
    """`with profiler.step(3):` around a rollout batch, `with profiler.phase("train"):` around its parts.

    Both do nothing on ranks and in steps that are not to be recorded.
    """

    def __init__(self, config: ProfileConfig, run_dir: str, rank: int) -> None:
        """Raises ConfigError for what this device has not."""
        for kind in ("memory", "nvtx"):
            if config.steps and kind in config.record and not device.has_cuda():
                raise ConfigError(f"profile.record={kind} must go with GPUs; on CPU there is trace")
        self._steps = config.steps if rank in config.ranks else ()
        self._kinds, self._folder, self._rank = config.record, Path(run_dir, "profile"), rank
        self._records = False

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Record the block, where asked to, in RUN_DIR/profile."""
        if step not in self._steps:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        name, kinds = f"step-{step}-rank-{self._rank}", self._kinds
        with ExitStack() as stack:
            if "trace" in kinds:
                stack.enter_context(_trace(self._folder / f"{name}.json.gz"))
            if "memory" in kinds:
                stack.enter_context(memory_history(self._folder / f"{name}.pickle"))
            if "nvtx" in kinds:
                stack.enter_context(nsys_capture())
            self._records = True
            stack.callback(self._stop)
            yield

    def _stop(self) -> None:
        self._records = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the block in what is recorded."""
        if not self._records:
            yield
            return
        with nvtx_range(name), torch.profiler.record_function(name):
            yield


@contextmanager
def _trace(path: Path) -> Iterator[None]:
    """Not written where the block raises."""
    with torch.profiler.profile(activities=activities()) as profile:
        yield
    profile.export_chrome_trace(str(path))
