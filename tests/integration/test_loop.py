"""The whole loop on PP=2 with a real SGLang server: it agrees with transformers and survives the server's death."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rpp.observability.rollouts import rollouts_path
from megatron_rpp.observability.writers import read_metrics
from megatron_rpp.parallel.local_launch import launch_local

METRICS = {
    "step", "policy_version", "reward/mean", "reward/std", "eval/sums/accuracy", "response/length_mean",
    "response/truncated_fraction", "kl/mean", "advantage/mean", "advantage/std", "loss/policy", "loss/total",
    "ratio/mean", "clip/fraction", "entropy/mean", "grad_norm", "lr", "mismatch/logprob_abs_mean",
    "time/rollout", "time/score", "time/train", "time/sync", "time/step", "tokens_per_second",
}  # fmt: skip
GREEDY_TOKENS = 6  # as in loop_worker


def write_problems(path: Path, count: int) -> None:
    """Sums of one digit, one JSON object a line."""
    problems = [{"prompt": f"{i % 10}+{i // 10}=", "answer": str(i % 10 + i // 10)} for i in range(count)]
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))


def write_config(path: Path, model: Path, run_dir: Path, problems: Path) -> None:
    path.write_text(
        f"""
run = {{ dir = "{run_dir}", steps = 2, seed = 5 }}
model = {{ path = "{model}" }}
parallel = {{ pipeline = 2 }}
algorithm = {{ num_samples_per_prompt = 8 }}
rollout = {{ num_prompts = 20, max_response_tokens = 2, context_length = 32 }}
train = {{ batch_size = 80, micro_batch_size = 20 }}
optimizer = {{ lr = 1e-2 }}
eval = {{ num_prompts = 6 }}
checkpoint = {{ interval = 1, keep = 1 }}
[data]
train = {{ kind = "jsonl", path = "{problems}", size = 40 }}
evals.sums = {{ kind = "jsonl", path = "{problems.with_name("eval.jsonl")}" }}
"""
    )


@pytest.fixture(scope="module")
def run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two steps; the server is killed while it samples the second."""
    root = tmp_path_factory.mktemp("loop")
    write_problems(root / "problems.jsonl", 40)
    write_problems(root / "eval.jsonl", 6)
    write_config(root / "run.toml", tiny_model_dir, root / "run", root / "problems.jsonl")
    argv = [sys.executable, "-m", "tests.integration.loop_worker", str(root / "run.toml"), str(root)]
    assert launch_local(argv, 2, root / "run") == 0
    return {"root": root, **json.loads((root / "result.json").read_text())}


def transformers_greedy(model_dir: Path, prompts: list[str]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
        out = model.generate(ids, max_new_tokens=GREEDY_TOKENS, do_sample=False)
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def test_server_decodes_the_trained_weights_after_a_sync(run: dict[str, Any], tiny_model_dir: Path) -> None:
    prompts = [json.loads(line)["prompt"] for line in (run["root"] / "problems.jsonl").open()][:6]
    assert read_metrics(run["root"] / "run")[0]["reward/std"] > 0, "no reward, so no gradient: change the seed"
    assert run["before"] == transformers_greedy(tiny_model_dir, prompts)
    assert run["after"] == transformers_greedy(run["root"] / "trained", prompts)
    assert run["after"] != run["before"], "the optimizer steps left no trace in the server"


def test_killed_server_is_restarted_with_the_current_weights(run: dict[str, Any]) -> None:
    assert run["server_pids"] != [run["killed"]], "no server was restarted"
    _, second = read_metrics(run["root"] / "run")
    assert second["policy_version"] == 1
    # The new server started from the initial weights; only a sync makes it agree with the trained policy.
    assert second["mismatch/logprob_abs_mean"] < 1e-3


def test_an_update_session_left_open_does_not_block_the_next_sync(run: dict[str, Any]) -> None:
    # The worker opened one before the first step; the second step has sampled from the synced weights.
    assert "already open" in run["second_begin"], "no session was open"
    assert [s["policy_version"] for s in read_metrics(run["root"] / "run")[:2]] == [0, 1]


def test_first_step_agrees_with_the_engine_and_itself(run: dict[str, Any]) -> None:
    first = read_metrics(run["root"] / "run")[0]
    assert abs(first["ratio/mean"] - 1) < 1e-4
    assert first["mismatch/logprob_abs_mean"] < 1e-3
    assert abs(first["kl/mean"]) < 1e-6
    assert first["advantage/mean"] == pytest.approx(0, abs=1e-9)


def test_run_directory_holds_what_the_readme_promises(run: dict[str, Any]) -> None:
    run_dir = run["root"] / "run"
    first, second = read_metrics(run_dir)
    assert first.keys() >= METRICS and second.keys() >= METRICS
    for name in ("config.toml", "logs/rank-0.txt", "logs/rank-1.txt", "rollouts/step-1.jsonl", "tensorboard"):
        assert (run_dir / name).exists(), name
    rollouts = read_rollouts(run_dir, 1)
    assert len(rollouts) == 160 and {r["policy_version"] for r in rollouts} == {1}


def test_no_server_outlives_its_run(run: dict[str, Any]) -> None:
    for pid in (run["killed"], *run["server_pids"]):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_resumed_run_goes_on_where_it_stopped(run: dict[str, Any]) -> None:
    run_dir = run["root"] / "run"
    seen = {r["prompt_id"] for step in (0, 1) for r in read_rollouts(run_dir, step)}
    command = [sys.executable, "-m", "megatron_rpp.cli", "train", str(run["root"] / "run.toml")]
    done = subprocess.run([*command, "--resume", "--run.steps=3"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = read_metrics(run_dir)
    assert [s["step"] for s in steps] == [0, 1, 2]
    assert steps[2]["policy_version"] == 2
    assert steps[2]["mismatch/logprob_abs_mean"] < 1e-3, "the new server does not hold the resumed weights"
    assert abs(steps[2]["kl/mean"]) > 1e-4, "the resumed policy equals the reference: its weights were not loaded"
    assert len(seen) == 40 and len(read_rollouts(run_dir, 2)) == 160
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step-000003"]


def test_packed_sequences_train_on_context_parallel_ranks_of_two_replicas(tiny_model_dir: Path, tmp_path: Path) -> None:
    write_problems(tmp_path / "problems.jsonl", 40)
    write_config(tmp_path / "run.toml", tiny_model_dir, tmp_path / "run", tmp_path / "problems.jsonl")
    layout = ["--parallel.pipeline=1", "--parallel.context=2", "--parallel.data=2", "--train.micro_batch_tokens=96"]
    # A random model earns nothing; the entropy bonus moves it.
    more = ["--rollout.max_response_tokens=8", "--eval.interval=0", "--algorithm.entropy_coef=0.1"]
    more += ["--profile.steps=1", "--profile.ranks=0,3", "--memory.recompute=full"]
    more += ["--optimizer.overlap_grad_reduce=true", "--optimizer.overlap_param_gather=true"]
    command = [sys.executable, "-m", "megatron_rpp.cli", "train", str(tmp_path / "run.toml"), *layout, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = read_metrics(tmp_path / "run")
    for number, step in enumerate(steps):
        assert step["policy_version"] == number and abs(step["ratio/mean"] - 1) < 1e-4
        assert step["mismatch/logprob_abs_mean"] < 1e-3, "engine and trainer differ: sync, packing or context parallel"
        assert 0 <= step["train/dp_imbalance"] < 0.05 and step["train/padding_waste"] < 0.3
        groups = Counter(r["prompt_id"] for replica in (0, 1) for r in read_rollouts(tmp_path / "run", number, replica))
        assert len(groups) == 20 and set(groups.values()) == {8}
    assert len(steps) == 2 and abs(steps[1]["kl/mean"]) > 1e-4, "the policy has not moved"
    traces = sorted((tmp_path / "run" / "profile").iterdir())
    assert [path.name for path in traces] == ["step-1-rank-0.json.gz", "step-1-rank-3.json.gz"]
    with gzip.open(traces[0]) as file:
        named = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert named >= {"rollout", "reward", "balance", "score", "train", "sync", "save"}


def read_rollouts(run_dir: Path, step: int, replica: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rollouts_path(run_dir, step, replica).open()]
