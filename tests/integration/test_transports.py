"""`rpp sft`, then `rpp train` over every transport: the server always samples as the trainer scores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rpp.observability.writers import read_metrics
from tests.integration.test_loop import read_rollouts, write_config, write_problems

RUNS = {
    "tp2_sp_broadcast_to_tp2_server": (
        "--parallel.tensor=2",
        "--parallel.sequence=true",
        "--rollout.server_tensor=2",
        "--algorithm.preset=grpo",
        "--algorithm.entropy_coef=0.01",
        "--algorithm.importance_correction=truncated",
        "--reward.normalization=running",
    ),
    "dp2_disk": (
        "--parallel.data=2",
        "--weight_sync.transports=disk",
        "--algorithm.preset=remax",
        "--algorithm.kl_target=10.0",
        "--algorithm.kl_horizon=1000",
    ),
    "no_reference": ("--algorithm.preset=dr_grpo",),
}


def rpp(command: str, config: Path, *settings: str) -> str:
    argv = [sys.executable, "-m", "megatron_rpp.cli", command, str(config), "--parallel.pipeline=1", *settings]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def warm_config(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that starts from a policy which answers with a digit and then stops."""
    root = tmp_path_factory.mktemp("warm")
    write_problems(root / "problems.jsonl", 40)
    write_problems(root / "eval.jsonl", 6)
    write_config(root / "run.toml", root / "sft", root / "run", root / "problems.jsonl")
    settings = (f"--sft.init={tiny_model_dir}", f"--sft.data={root / 'problems.jsonl'}", f"--sft.output={root / 'sft'}")
    rpp("sft", root / "run.toml", *settings, "--sft.steps=60", "--sft.batch_size=32", "--sft.lr=5e-3")
    return root / "run.toml"


@pytest.mark.parametrize("name", RUNS)
def test_engine_and_trainer_agree_after_a_sync(name: str, warm_config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    rpp("train", warm_config, f"--run.dir={run_dir}", "--eval.interval=0", "--checkpoint.interval=0", *RUNS[name])
    first, second = read_metrics(run_dir)
    for step in (first, second):
        assert step["mismatch/logprob_abs_mean"] < 1e-3
        assert abs(step["ratio/mean"] - 1) < 1e-4
    assert (first["policy_version"], second["policy_version"]) == (0, 1)
    assert first["reward/mean"] > 0.02, "the warm start has not taught the policy to answer"
    if name == "no_reference":
        assert "kl/mean" not in first and first["grad_norm"] > 0
        return
    assert abs(second["kl/mean"]) > 1e-3, "the weights have not moved, so the sync proves nothing"
    if name == "tp2_sp_broadcast_to_tp2_server":
        assert second["loss/kl"] > 0 > second["loss/entropy"]
        assert second["importance/weight_mean"] == pytest.approx(1.0, abs=1e-3)
        assert abs(first["reward/shaped_mean"]) < 1e-9 != first["reward/mean"]
    if name == "dp2_disk":
        assert first["time/baseline"] > 0 and 0 <= first["reward/greedy_mean"] <= 1
        # 160 responses, a KL far below its target: down by 20 % of 160 / 1000.
        assert second["kl/coef"] == pytest.approx(first["kl/coef"] * (1 - 0.2 * 160 / 1000))
        asked = [{r["prompt_id"] for r in read_rollouts(run_dir, 0, replica)} for replica in (0, 1)]
        assert len(asked[0]) == len(asked[1]) == 10 and not asked[0] & asked[1]
