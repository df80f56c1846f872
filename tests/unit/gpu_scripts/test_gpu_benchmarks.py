"""The GPU benchmarks run whole at toy size on CPU; their figures are of what their keys name."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import timing, train_step
from benchmarks.gpu.job import ALL
from benchmarks.gpu.models import SHAPES, shape
from megatron_rpp.config.schema import Config
from megatron_rpp.device.gpus import GPU
from megatron_rpp.model.cost import sequence_cost
from tests.support.rank_server import REPOSITORY, run_ranks


def test_all_benchmarks_run_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    run_ranks("benchmarks.gpu.job", ["--tiny", "--repeats", "1", "--out", str(out)], 1, tmp_path)
    *table, last = (tmp_path / "logs" / "rank-0.txt").read_text().splitlines()
    found = json.loads(last)
    assert json.loads(out.read_text()) == found
    assert [len(found[name]) for name in ALL] == [3, 1, 1]
    assert {row["path"] for row in found["logprobs"]} == {"naive", "chunked", "fused"}
    assert found["train_step"][0]["flops"] > 0 and found["ipc_sync"][0]["bytes"] > 100_000
    assert sum(line.startswith("log-probs ") for line in table) == 3


def test_mfu_is_of_the_makers_figure_and_speed_of_the_same_steps_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "gpus", lambda: [GPU("NVIDIA H200", 141 << 30, (9, 0))])
    found = train_step.against({"flops": 989e12, "seconds": 2.0}, matmul=618.125e12, plain_seconds=3.0)
    assert found == {"mfu": 0.5, "of_matmul": pytest.approx(0.8), "speedup_over_bf16": 1.5}


@pytest.mark.parametrize(
    ("cuda", "engine", "expected"),
    [
        ("13.0", "2.20.2", ("delayed", "tensorwise", "blockwise")),
        ("12.8", "2.20.2", ("delayed", "tensorwise")),
        ("13.0", "2.1.0", ("delayed",)),
    ],
)
def test_recipes_are_those_of_gpu_cuda_and_transformer_engine(
    monkeypatch: pytest.MonkeyPatch, cuda: str, engine: str, expected: tuple[str, ...]
) -> None:
    monkeypatch.setattr(timing, "gpus", lambda: [GPU("NVIDIA H200", 141 << 30, (9, 0))])
    monkeypatch.setattr(timing, "software", lambda: {"CUDA": cuda})
    monkeypatch.setattr(timing, "package_version", lambda name: engine)
    assert timing.recipes() == expected


def test_a_gpu_of_unknown_speed_has_no_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "gpus", lambda: [GPU("NVIDIA X1", 1, (9, 0))])
    assert train_step.against({"flops": 1.0, "seconds": 1.0}, 1.0, None)["mfu"] is None


def test_shapes_are_those_of_1b_and_4b_models(tmp_path: Path) -> None:
    """Twice the weights a token, and attention on top."""
    for name, weights in (("llama-1b", 1.24e9), ("qwen3-4b", 4.02e9)):
        assert sequence_cost(shape(name, tmp_path))(1) == pytest.approx(2 * weights, rel=0.02), name
    assert set(SHAPES) == {"llama-1b", "qwen3-4b", "tiny"}


def test_a_microbatch_is_full_of_whole_sequences() -> None:
    args = argparse.Namespace(tiny=False, length=4096)
    for tokens in (8192, 32768):
        config = train_step.config_of("qwen3-4b", tokens, "blockwise", args)
        assert config.train.batch_size * 4096 == train_step.MICROBATCHES * tokens
        assert config.memory.recompute == ("full" if tokens == 32768 else "none")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no kernel\nhere"), AssertionError("a\nb")]
)
def test_what_does_not_run_is_a_line_and_the_next_recipe_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    def one(hf: object, parallel: object, config: Config, args: object) -> train_step.Result:
        if config.fp8.recipe == "none":
            raise error
        return {"seconds": 1.0, "flops": 1.0}

    monkeypatch.setattr(train_step, "one", one)
    monkeypatch.setattr(train_step, "matmul_flops", lambda *_, **__: 1.0)
    monkeypatch.setattr(train_step, "recipes", lambda: ("delayed",))
    parallel: Any = None
    first, second = train_step.run(parallel, tmp_path, argparse.Namespace(tiny=True, length=64, repeats=1))
    assert train_step.line(first).endswith(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    assert second["recipe"] == "delayed" and second["speedup_over_bf16"] is None and train_step.line(second)


def test_a_benchmark_that_fails_keeps_what_it_had_found(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.gpu import job

    def run(*_: object) -> Iterator[train_step.Result]:
        yield {"seconds": 1.0}
        raise RuntimeError("the receiver has ended")

    module, results = SimpleNamespace(run=run, line=str), list[train_step.Result]()
    parallel: Any = None
    kept = list[int]()
    args = argparse.Namespace()
    assert not job.measured(module, parallel, Path(), args, results, lambda: kept.append(len(results)))
    assert kept == [1], "nothing is kept before the end"
    assert results == [{"seconds": 1.0}] and "the receiver has ended" in capsys.readouterr().err


def test_some_benchmarks_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.gpu import ipc_sync, job, logprobs

    modules = {"logprobs": logprobs, "ipc_sync": ipc_sync}
    assert job.arguments(modules, []).only == ["logprobs", "ipc_sync"]
    assert job.arguments(modules, ["--only", "ipc_sync"]).only == ["ipc_sync"]
    with pytest.raises(SystemExit):
        job.arguments(modules, ["--only", "logprob"])
    assert "--only names logprob; there are logprobs, ipc_sync" in capsys.readouterr().err


def test_the_json_comes_also_when_time_runs_out(tmp_path: Path) -> None:
    """SIGTERM, as `timeout` sends it, in the middle of the first benchmark."""
    program = (
        "import os, signal; from benchmarks.gpu import job, logprobs\n"
        "logprobs.run = lambda *_: (os.kill(os.getpid(), signal.SIGTERM) for _ in range(1))\n"
        "import sys; sys.argv = ['job', '--tiny']; job.main('logprobs')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "ended by SIGTERM" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["logprobs"] == []


def test_a_gpu_that_is_not_there_is_said_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import job

    monkeypatch.setattr(job, "arguments", lambda modules: SimpleNamespace(tiny=False))
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        job.main("logprobs")
