"""Every transport and trainer layout gives the server the trained weights: it samples as the trainer scores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rpp.observability.writers import read_metrics
from tests.integration.test_loop import read_rollouts, write_config, write_problems

RUNS = {
    "tp2_sp_broadcast_to_tp2_server": ("tensor=2", "sequence=true", "server_tensor=2"),
    "dp2_disk": ("data=2", "transport=disk"),
}
SECTION = {"server_tensor": "rollout", "transport": "weight_sync"}


@pytest.mark.parametrize("name", RUNS)
def test_engine_and_trainer_agree_after_a_sync(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    write_problems(tmp_path / "problems.jsonl", 40)
    write_config(tmp_path / "run.toml", tiny_model_dir, tmp_path / "run", tmp_path / "problems.jsonl")
    settings = [f"--{SECTION.get(s.split('=')[0], 'parallel')}.{s}" for s in RUNS[name]]
    settings += ["--parallel.pipeline=1", "--eval.interval=0", "--checkpoint.interval=0"]
    # Many samples, so that a random model's few right answers move the weights.
    settings += ["--rollout.num_prompts=40", "--algorithm.num_samples_per_prompt=32", "--train.batch_size=640"]
    command = [sys.executable, "-m", "megatron_rpp.cli", "train", str(tmp_path / "run.toml"), *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = read_metrics(tmp_path / "run")
    for step in (first, second):
        assert step["mismatch/logprob_abs_mean"] < 1e-3
        assert abs(step["ratio/mean"] - 1) < 1e-4
    assert (first["policy_version"], second["policy_version"]) == (0, 1)
    assert first["reward/std"] > 0 and abs(second["kl/mean"]) > 1e-3, "the weights have not moved"
    if "data=2" in RUNS[name]:
        replicas = [read_rollouts(tmp_path / "run", 0), read_rollouts(tmp_path / "run", 0, replica=1)]
        asked = [{r["prompt_id"] for r in replica} for replica in replicas]
        assert len(asked[0]) == len(asked[1]) == 20 and not asked[0] & asked[1]
