"""With all of `schedule` on, while real SGLang servers are killed, each prompt is used exactly once an epoch.

tests/distributed/test_schedule.py has every mode over 50 steps.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from megatron_rpp.config.load import load_config
from megatron_rpp.data.prompt_source import PromptSource
from megatron_rpp.data.prompts import load_prompts
from megatron_rpp.data.tokenizer import load_tokenizer
from megatron_rpp.observability.writers import read_metrics
from tests.integration.test_loop import write_problems
from tests.support.prompt_accounts import check_used_once_an_epoch, used

STEPS, PER_STEP, SAMPLES, KILLS = 12, 4, 2, 2


def test_each_prompt_is_used_once_an_epoch_while_servers_are_killed(tiny_model_dir: Path, tmp_path: Path) -> None:
    write_problems(tmp_path / "problems.jsonl", 33)
    run_dir, config_path = tmp_path / "run", tmp_path / "run.toml"
    config_path.write_text(
        f"""
run = {{ dir = "{run_dir}", steps = {STEPS} }}
model = {{ path = "{tiny_model_dir}" }}
algorithm = {{ num_samples_per_prompt = {SAMPLES} }}
train = {{ batch_size = 4, micro_batch_size = 8 }}
optimizer = {{ lr = 1e-4 }}
checkpoint = {{ interval = 0 }}
data.train = {{ kind = "jsonl", path = "{tmp_path}/problems.jsonl" }}
schedule = {{ over_sampling = 1.5, dynamic_sampling = true, time_budget_s = 20.0, token_budget = 200 }}
[rollout]
num_prompts = {PER_STEP}
max_response_tokens = 24
context_length = 64
num_servers = 2
restart_backoff_s = 0.1
"""
    )
    argv = [sys.executable, "-m", "tests.integration.schedule_worker", str(config_path), str(KILLS)]
    argv.append(str(tmp_path / "result.json"))
    done = subprocess.run(argv, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["killed"] == KILLS and result["left"] == []
    found = Counter[int]()
    for step in range(STEPS):
        trained, skipped = used(run_dir, step, SAMPLES)
        found.update([*trained, *skipped])
    config = load_config([config_path], [])
    prompts = load_prompts(config.data.train, config.data, load_tokenizer(tiny_model_dir), max_prompt_tokens=40)
    check_used_once_an_epoch(found, PromptSource(prompts, PER_STEP, config.run.seed), result["source"])
    steps = read_metrics(run_dir)
    assert [s["policy_version"] for s in steps] == list(range(STEPS)) and min(s["sync/servers"] for s in steps) == 1
    assert max(s["mismatch/logprob_abs_mean"] for s in steps) < 1e-3, "a server sampled from other weights"
    assert sum(s["rollout/skipped"] for s in steps) > 4 and sum(s["rollout/aborted"] for s in steps) > 0
