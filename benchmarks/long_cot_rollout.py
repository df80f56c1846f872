"""The loop of `rpp train` with a real SGLang server whose responses have recorded lengths: who waits how long.

Every mode is a run of its own with the same prompts, attached to the same server through benchmarks/long_cot_proxy.py;
how many requests the server is running is read from its /v1/loads, some twenty times a second.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.long_cot_lengths import MODES, PROMPTS, SAMPLES, Lengths
from benchmarks.long_cot_proxy import LengthProxy
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.observability.writers import read_metrics
from megatron_rpp.rollout.http import get_json
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.rollout.sglang_server import SGLangServer

Result = dict[str, Any]
PLAIN = PROMPTS * SAMPLES  # requests of a plain step
SLOTS = 2 * PLAIN  # requests that the server runs at once: all that the largest over-sampling asks for
POSITIONS = 1024


@dataclass(frozen=True)
class Load:
    """What the server was doing."""

    at: float  # monotonic seconds
    running: int  # requests


@dataclass(frozen=True)
class Step:
    """One step of a run."""

    start: float  # monotonic seconds, of its first request
    rollout_s: float
    step_s: float


def rollout_part(lengths: Lengths, folder: Path, scale: int, steps: int, modes: Sequence[str]) -> Result:
    """Of MODES those named, in turn, the plain one first."""
    short = lengths.scaled(scale)
    model, data = folder / "rollout-model", folder / "prompts.jsonl"
    write_start(model, data)
    rollout = RolloutConfig(
        context_length=POSITIONS,
        max_response_tokens=short.limit,
        max_total_tokens=SLOTS * (short.longest_row + 16),
        server_args=("--max-running-requests", str(SLOTS)),
    )
    server = SGLangServer(str(model), rollout, dtype="float32", log_path=folder / "sglang.log")
    server.start()
    found = {}
    try:
        server.wait_ready(rollout.startup_deadline_s)
        for mode, settings in ((mode, MODES[mode]) for mode in MODES if mode in ("plain", *modes)):
            with LengthProxy(server.url, short) as proxy, Watch(server.url) as watch:
                run_dir = folder / mode
                train(run_dir, model, data, proxy.url, steps, settings)
            found[mode] = summarize(steps_of(run_dir, proxy.starts), watch.loads)
            print_mode(mode, found[mode])
    finally:
        server.stop()
    keys = ("rollout_s", "tail_s", "step_s")
    return {
        "idle_fraction": {
            mode: {who: of[f"{who}_idle"] for who in ("engine", "trainer")} for mode, of in found.items()
        },
        **{key: {mode: of[key] for mode, of in found.items()} for key in keys},
        **{
            f"{key.removesuffix('_s')}_ratio": {mode: of[key] / found["plain"][key] for mode, of in found.items()}
            for key in ("rollout_s", "tail_s")
        },
    }


def write_start(model: Path, data: Path) -> None:
    """A small random Llama with the demo's tokenizer, and prompts that are all different."""
    from benchmarks.weight_sync import write_llama
    from examples.make_demo import problem, write_jsonl, write_tokenizer

    write_llama(model, vocab=32, hidden=64, ffn=128, layers=2, heads=4, positions=POSITIONS)
    write_tokenizer(model)
    write_jsonl(data, (problem((a, b)) for a in range(10, 42) for b in range(10, 42)))


def train(run_dir: Path, model: Path, data: Path, url: str, steps: int, settings: Mapping[str, Any]) -> None:
    """`rpp train`; its words are in RUN_DIR.txt. Ends this process where it fails."""
    every = {
        "run.dir": run_dir, "run.steps": steps, "model.path": model, "rollout.urls": url,
        "rollout.num_prompts": PROMPTS, "algorithm.num_samples_per_prompt": SAMPLES, "algorithm.kl_coef": 0,
        "rollout.context_length": POSITIONS, "rollout.max_response_tokens": POSITIONS - 16,
        "train.batch_size": PLAIN, "train.micro_batch_tokens": 2 * POSITIONS, "optimizer.lr": 1e-6,
        "data.prompt_template": "{expression}=", "data.train.kind": "jsonl", "data.train.path": data,
        "eval.interval": 0, "checkpoint.interval": 0, "rollout.record": "off", "parity.stop": 0, **settings,
    }  # fmt: skip
    log, empty = run_dir.with_name(f"{run_dir.name}.txt"), run_dir.parent / "config.toml"
    empty.touch()  # `rpp train` wants a file
    words = [str(empty), *(f"--{key}={value}" for key, value in every.items())]
    with log.open("w") as file:
        argv = [sys.executable, "-m", "megatron_rpp.cli", "train", *words]
        code = subprocess.run(argv, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        sys.exit(f"{run_dir.name} ended with {code}:\n{log.read_text()[-3000:]}")


class Watch:
    """Reads the server's load now and then, from a thread. A context manager."""

    def __init__(self, url: str, pause_s: float = 0.05) -> None:
        self.loads: list[Load] = []
        self._url, self._pause_s, self._is_over = url, pause_s, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(self._pause_s):
            try:
                reply: Any = get_json(self._url, "v1/loads?include=core", timeout_s=10.0)
            except RolloutError:
                continue  # once more; what is missing counts as the last one did
            self.loads.append(Load(time.monotonic(), sum(each["num_running_reqs"] for each in reply["loads"])))


def steps_of(run_dir: Path, starts: Sequence[float]) -> list[Step]:
    """The steps of a run but for its first. A step begins with the first request after the end of the one before."""
    found: list[Step] = []
    after = 0.0
    for record in read_metrics(run_dir):
        start = min(at for at in starts if at > after)
        found.append(Step(start, record["time/rollout"], record["time/step"]))
        after = start + record["time/rollout"]
    return found[1:]


def summarize(steps: Sequence[Step], loads: Sequence[Load]) -> dict[str, float]:
    """Means over the steps; a load counts from when it was read to the next."""
    used = tail = total = 0.0
    for step in steps:
        end, sampled = step.start + step.step_s, step.start + step.rollout_s
        total += step.step_s
        for load, until in zip(loads, [*(each.at for each in loads[1:]), float("inf")], strict=True):
            used += load.running * overlap(load.at, until, step.start, end)
            if load.running < PLAIN / 2:
                tail += overlap(load.at, until, step.start, sampled)
    return {
        "engine_idle": 1 - used / (SLOTS * total),
        "trainer_idle": sum(step.rollout_s for step in steps) / total,
        "rollout_s": statistics.fmean(step.rollout_s for step in steps),
        "tail_s": tail / len(steps),
        "step_s": total / len(steps),
    }


def overlap(start: float, end: float, other_start: float, other_end: float) -> float:
    """Seconds that two intervals share."""
    return max(0.0, min(end, other_end) - max(start, other_start))


def print_mode(mode: str, found: Mapping[str, float]) -> None:
    idle = f"idle: engine {found['engine_idle']:5.1%}, trainer {found['trainer_idle']:5.1%}"
    print(f"{mode:20} rollout {found['rollout_s']:6.2f} s, tail {found['tail_s']:6.2f} s; {idle}", flush=True)
