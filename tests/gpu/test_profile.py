"""A step that is recorded leaves its files, with this project's names and the GPU's kernels in them."""

from __future__ import annotations

import gzip
import json

from megatron_rpp.config.performance import ProfileConfig
from megatron_rpp.observability.profiler import Profiler
from tests.gpu.site import Site
from tests.gpu.sums import train, write_start


def a_step_is_recorded(site: Site, kinds: tuple[str, ...]) -> None:
    path, sums = write_start(site)
    profiler = Profiler(ProfileConfig(steps=(1,), record=kinds), str(site.folder / "run"), rank=0)
    for step in range(2):
        with profiler.step(step), profiler.phase("train"):
            train(site, site.config(path), sums, steps=1, seed=0)
    folder, ends = site.folder / "run" / "profile", {"trace": "json.gz", "memory": "pickle"}
    assert {file.name for file in folder.iterdir()} == {f"step-1-rank-0.{ends[kind]}" for kind in kinds}
    assert all(file.stat().st_size > 0 for file in folder.iterdir())
    events = json.loads(gzip.decompress((folder / "step-1-rank-0.json.gz").read_bytes()))["traceEvents"]
    assert any(event.get("name") == "train" for event in events)
    assert site.is_tiny or any(event.get("cat") == "kernel" for event in events), "nothing of the GPU in the trace"


def test_a_trace_and_a_memory_snapshot_are_written(site: Site) -> None:
    a_step_is_recorded(site, ("trace", "memory"))
