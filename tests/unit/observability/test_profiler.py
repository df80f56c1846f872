"""Which steps and ranks are recorded, and what a trace says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_rpp import device
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.performance import ProfileConfig
from megatron_rpp.observability.profiler import Profiler


def run(profiler: Profiler, steps: int) -> None:
    for step in range(steps):
        with profiler.step(step):
            for phase in ("score", "train"):
                with profiler.phase(phase):
                    torch.ones(2).sin_()


def test_the_asked_steps_alone_are_traced_with_the_names_of_their_phases(tmp_path: Path) -> None:
    run(Profiler(ProfileConfig(steps=(1, 3)), str(tmp_path), rank=0), 4)
    run(Profiler(ProfileConfig(steps=(1, 3)), str(tmp_path), rank=1), 4)
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == [f"step-{n}-rank-0.json.gz" for n in (1, 3)]
    with gzip.open(tmp_path / "profile" / "step-3-rank-0.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("score") == names.count("train") == 1 and "aten::sin_" in names


def test_nothing_is_made_where_no_step_is_asked_for(tmp_path: Path) -> None:
    run(Profiler(ProfileConfig(), str(tmp_path), rank=0), 2)
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_raises_leaves_no_trace_and_the_next_one_is_recorded(tmp_path: Path) -> None:
    profiler = Profiler(ProfileConfig(steps=(0, 1)), str(tmp_path), rank=0)
    with pytest.raises(RuntimeError, match="mine"), profiler.step(0):
        raise RuntimeError("mine")
    with profiler.step(1), profiler.phase("train"):
        pass
    assert [p.name for p in (tmp_path / "profile").iterdir()] == ["step-1-rank-0.json.gz"]


@pytest.mark.parametrize("kind", ["memory", "nvtx"])
def test_what_only_gpus_have_is_refused_on_cpu(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    with pytest.raises(ConfigError, match=f"profile.record={kind} must go with GPUs"):
        Profiler(ProfileConfig(steps=(1,), record=(kind,)), str(tmp_path), rank=0)
