"""An interrupted run and an undisturbed one are the same run, bit by bit, with a real SGLang server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.json
import pyarrow.parquet
import pytest

from megatron_rpp.checkpoint.files import read_manifest
from megatron_rpp.observability.rollouts import rollouts_path
from megatron_rpp.observability.writers import read_metrics
from megatron_rpp.rollout.journal import read_lines
from megatron_rpp.rollout.sglang_server import SGLangServer
from tests.integration.test_loop import write_problems

STEPS, KILLS = 12, 10
TIMINGS = ("time/", "sync/send_s", "tokens_per_second", "rollout/tail_s", "rollout/idle_fraction")

CONFIG = """
run = {{ dir = "{run_dir}", steps = {steps}, seed = 5 }}
model = {{ path = "{model}" }}
algorithm = {{ num_samples_per_prompt = 4, kl_coef = 0.05, kl_target = 0.01, kl_horizon = 200 }}
rollout = {{ num_prompts = 8, max_response_tokens = 4, context_length = 32, urls = ["{url}"], record = "all" }}
train = {{ batch_size = 16, micro_batch_size = 8 }}
optimizer = {{ lr = 3e-3, lr_schedule = "cosine", warmup_steps = 4 }}
reward = {{ normalization = "running" }}
eval = {{ num_prompts = 4, interval = 3, samples = 2 }}
checkpoint = {{ interval = 2, keep = 2 }}
[data]
sources.many = {{ kind = "jsonl", path = "{root}/problems.jsonl", size = 30, weight = 2 }}
sources.few = {{ kind = "parquet", path = "{root}/few.parquet", weight = 1 }}
evals.sums = {{ kind = "jsonl", path = "{root}/eval.jsonl" }}
evals.more = {{ kind = "jsonl", path = "{root}/more.jsonl" }}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    write_problems(path / "problems.jsonl", 40)
    write_problems(path / "eval.jsonl", 4)
    write_problems(path / "more.jsonl", 2)
    pyarrow.parquet.write_table(pyarrow.json.read_json(path / "problems.jsonl").slice(30), path / "few.parquet")
    return path


@pytest.fixture(scope="module")
def config(root: Path, tiny_model_dir: Path, sglang_server: SGLangServer) -> Path:
    """Of a run with all that has state: schedule, adaptive KL, running normalization, evaluations, mixed sources."""
    text = CONFIG.format(root=root, run_dir=root / "run", model=tiny_model_dir, url=sglang_server.url, steps=STEPS)
    (root / "run.toml").write_text(text)
    return root / "run.toml"


def work(command: str, config: Path, *arguments: str) -> str:
    """What resume_worker.py says."""
    argv = [sys.executable, "-m", "tests.integration.resume_worker", command, str(config), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=900)
    logs = "".join(f"{path}:\n{path.read_text()[-2000:]}" for path in config.parent.glob("*/stderr/*"))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:] + logs
    return done.stdout


@pytest.fixture(scope="module")
def undisturbed(root: Path, config: Path) -> Path:
    work("finish", config, "--parallel.data=2")
    return root / "run"


def without_timings(run_dir: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in step.items() if not k.startswith(TIMINGS)} for step in read_metrics(run_dir)]


def tensor_files(checkpoint: Path) -> dict[str, Any]:
    """Checksums of the files with weights and optimizer state."""
    facts = read_manifest(checkpoint)
    assert facts is not None
    return {name: fact for name, fact in facts.items() if name.endswith(".distcp")}


def test_run_killed_ten_times_equals_the_undisturbed_one(root: Path, config: Path, undisturbed: Path) -> None:
    again = root / "interrupted"
    options = ("--parallel.data=2", f"--run.dir={again}", f"--rollout.replay={undisturbed}", "--rollout.record=resume")
    work("interrupted", config, str(KILLS), *options)
    expected = without_timings(undisturbed)
    assert [step["step"] for step in expected] == list(range(STEPS))
    assert len({step["kl/coef"] for step in expected}) > 2 and expected[-1]["eval/policy_version"] == STEPS
    assert {"reward/many/mean", "reward/few/mean"} <= expected[0].keys(), "each source has a share of each step"
    assert {"eval/sums/accuracy", "eval/sums/pass@2", "eval/more/accuracy", "eval/more/maj@2"} <= expected[-1].keys()
    for one, other in zip(without_timings(again), expected, strict=True):
        assert one == other, f"step {other['step']}"
    last = f"checkpoints/step-{STEPS:06d}"
    assert tensor_files(again / last) == tensor_files(undisturbed / last), "final weights or moments"
    left = {path.name.partition(".")[0] for path in (again / "journal").iterdir()}
    assert left == {f"version-{STEPS:06d}"}, "only the last evaluation is newer than the last checkpoint"


def test_prompts_sampled_before_a_kill_are_not_sampled_again(root: Path, config: Path) -> None:
    run_dir = root / "killed"
    text = config.read_text().replace(str(root / "run"), str(run_dir)).replace("steps = 12", "steps = 1")
    text = text.replace('record = "all"', 'record = "all", max_concurrent_requests = 1').replace(
        "interval = 3", "interval = 0"
    )
    (root / "killed.toml").write_text(text)
    work("killed_in_rollout", root / "killed.toml", "3")
    journal = run_dir / "journal" / "version-000000.replica-0.jsonl"
    before, after = [*read_lines(journal.with_suffix(".before"))], [*read_lines(journal)]
    assert 3 <= len(before) < 8, "the kill came too late to tell anything"
    assert after[: len(before)] == before and len({line["key"] for line in after}) == len(after) == 8
    texts = [json.loads(line)["response"] for line in rollouts_path(run_dir, 0).open()]
    known = {line["group"]: [sample["text"] for sample in line["samples"]] for line in after}
    assert texts == [text for group in sorted(known) for text in known[group]]
    assert f"{len(before)} of 8 prompts are in the journal" in (run_dir / "logs" / "rank-0.txt").read_text()


def test_step_after_a_resume_at_another_layout_is_the_same(root: Path, config: Path) -> None:
    tp2, pp2 = root / "tp2", root / "pp2"
    options = ("--run.steps=2", "--checkpoint.interval=1", "--optimizer.lr_schedule=constant")
    work("finish", config, f"--run.dir={tp2}", "--parallel.tensor=2", *options)
    shutil.copytree(tp2 / "checkpoints" / "step-000001", pp2 / "checkpoints" / "step-000001")
    work("finish", config, f"--run.dir={pp2}", "--parallel.pipeline=2", f"--rollout.replay={tp2}", *options)
    (_, expected), (found,) = without_timings(tp2), without_timings(pp2)
    assert found["step"] == 1 and abs(expected["loss/total"]) > 1e-4
    for key in ("loss/total", "loss/policy", "kl/mean", "kl/coef", "reward/shaped_mean", "entropy/mean"):
        assert abs(found[key] - expected[key]) < 1e-5, key
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    log = (pp2 / "logs" / "rank-0.txt").read_text()
    assert "seeded anew" in log and "8 of 8 prompts are in the journal" in log
