"""The loop with servers on the trainer's own GPU: SGLang where it can be imported, else a receiver that checks.

RPP_SGLANG_PYTHONPATH names folders with SGLang and what it needs, where they cannot stand beside the trainer's
packages (docs/gpu.md).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.receiving import receiver
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.config.schema import Config
from megatron_rpp.engine.optimizer import make_trainable
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.model.hf_io.fp8_blocks import SCALE_SUFFIX
from megatron_rpp.model.stage_export import StageExport
from megatron_rpp.rollout.fleet import ServerFleet
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.rollout.sglang_server import SGLangServer
from megatron_rpp.sft import Demonstration
from megatron_rpp.weight_sync.build import build_engine
from tests.gpu.recipes import recipes_here
from tests.gpu.site import Site, with_fp8
from tests.gpu.sums import train_on, write_start
from tests.support.servers import running

ELSEWHERE = "RPP_SGLANG_PYTHONPATH"
SERVER_ARGS = (
    *("--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--mem-fraction-static", "0.3"),
)
STEPS, TIMEOUT_S = 2, 200
REWARD = Path(__file__).with_name("digits_reward.py")
"""Of the demo's answers, with nothing that a host may lack."""


def has_sglang() -> bool:
    return bool(os.environ.get(ELSEWHERE)) or importlib.util.find_spec("sglang") is not None


def sync_by_ipc(site: Site) -> None:
    """Two syncs of weights that a step lies between, each compared tensor by tensor (weight_sync.verify=full)."""
    path, sums = write_start(site)
    synced_twice(site, site.config(path), sums)


def float8_arrives(site: Site, recipe: str, transport: str = "ipc") -> None:
    """What a sync in float8 brings is, byte for byte, what the policy exports; nobody else compares it."""
    path, sums = write_start(site)
    config = with_fp8(site.config(path), recipe)
    config = replace(config, weight_sync=replace(config.weight_sync, dtype="float8", verify="off"))
    policy = synced_twice(site, config, sums, transport)
    arrived = torch.load(site.folder / "received" / "1.pt")["tensors"]
    sent = {name: tensor.cpu() for name, tensor in StageExport(policy, torch.float8_e4m3fn).tensors()}
    assert arrived.keys() == sent.keys() and any(name.endswith(SCALE_SUFFIX) for name in sent)
    other = [
        name for name in sent if sent[name].dtype != arrived[name].dtype or not same_bytes(sent[name], arrived[name])
    ]
    assert not other, other


def same_bytes(a: Tensor, b: Tensor) -> bool:
    a, b = a.contiguous(), b.contiguous()
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def synced_twice(site: Site, config: Config, sums: Sequence[Demonstration], transport: str = "ipc") -> Model:
    """The policy, whose weights a receiver has got before and after a step: in FOLDER/received, 0.pt and 1.pt."""
    out = site.folder / "received"
    out.mkdir()
    with receiver("tests.gpu.ipc_receiver", str(out)) as url:
        config = replace(
            config,
            rollout=RolloutConfig(urls=(url,), context_length=16, max_response_tokens=5),
            weight_sync=replace(config.weight_sync, transports=(transport,)),
        )
        built = build_model(config, site.parallel, path=config.model.path)
        policy, optimizer = make_trainable(built, config.optimizer, 1)
        fleet = ServerFleet(config)
        engine = build_engine(config, policy, fleet, SGLangClient((), config.rollout, decode=lambda ids: ""))
        try:
            engine.wait_ready()
            engine.sync(0)
            train_on(config, policy, optimizer, sums, steps=1)
            engine.sync(1)
            assert engine.last_sync is not None and engine.last_sync.transport == transport
        finally:
            engine.close()
            fleet.stop()
    return policy


def demo_settings(path: os.PathLike[str], run_dir: os.PathLike[str], url: str) -> list[str]:
    """Of `rpp train` on sums, with weights by IPC, and memory that trainer and server use in turns.

    Microbatches are small, so that activations are next to nothing beside the optimizer.
    """
    task = {"kind": "jsonl", "path": f"{path}/problems.jsonl"}
    settings = {
        "run.dir": run_dir, "run.steps": STEPS, "model.path": path, "model.dtype": "bfloat16", "model.layer_spec": "te",
        "model.vocab_divisor": 128, "data.prompt_template": "{expression}=",
        **{f"data.train.{key}": value for key, value in task.items()},
        "rollout.num_prompts": 16, "rollout.max_response_tokens": 5, "rollout.context_length": 16, "rollout.urls": url,
        "algorithm.num_samples_per_prompt": 4, "train.batch_size": 64, "train.micro_batch_tokens": 64,
        "reward.kind": "function", "reward.function": f"{REWARD}:share_of_digits",
        "rollout.release_memory": "true", "memory.offload": "optimizer,gradients,reference", "algorithm.kl_coef": 1e-3,
        "optimizer.lr": 1e-5, "weight_sync.transports": "ipc,disk", "eval.interval": 0, "checkpoint.interval": 0,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in settings.items()]


def test_weights_reach_a_checking_receiver_by_ipc(site: Site) -> None:
    sync_by_ipc(site)


def test_float8_weights_arrive_as_they_are_exported(site: Site) -> None:
    if "blockwise" not in recipes_here():
        pytest.skip("this GPU has no blockwise")
    float8_arrives(site, "blockwise")


def test_the_loop_trains_with_a_server_on_its_own_gpu(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_sglang():
        pytest.skip(f"SGLang is not installed, and {ELSEWHERE} is not set")
    path, _ = write_start(site)
    rollout = RolloutConfig(context_length=16, release_memory=True, server_args=SERVER_ARGS)
    server = SGLangServer(str(path), rollout, dtype="bfloat16", log_path=site.folder / "server.txt", device="cuda")
    ours = dict(os.environ)
    if elsewhere := os.environ.get(ELSEWHERE):
        monkeypatch.setenv("PYTHONPATH", elsewhere)
    with running(server):
        settings = demo_settings(path, site.folder / "run", server.url)
        command = [sys.executable, "-m", "megatron_rpp.cli", "train", *settings]
        subprocess.run(command, check=True, env=ours, timeout=TIMEOUT_S)
    lines = [json.loads(line) for line in (site.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "ratio/mean" in line]
    assert len(steps) == STEPS
    assert all(abs(step["ratio/mean"] - 1) < 1e-2 and math.isfinite(step["grad_norm"]) for step in steps)
    assert_away_while_sampling(steps[-1], parameters=(path / "model.safetensors").stat().st_size // 4)  # of float32


def assert_away_while_sampling(step: Mapping[str, float], parameters: int) -> None:
    """Not of the first step: before it the optimizer has no moments."""
    held, peak = step["memory/allocated_gib/rollout"], step["memory/peak_gib/train"]
    away = parameters * (12 + 4) / 2**30  # main weights, two moments; gradients
    assert peak - held >= away, f"{peak:.4f} GiB in training, {held:.4f} GiB in sampling: {away:.4f} was to be away"
