"""Reward models on a real SGLang server: its scores are transformers', and a run lives by them and outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.config.schema import Config, RunConfig
from megatron_rpp.experience.types import Prompt, Rollout, VersionSpan
from megatron_rpp.observability.logs import log_path
from megatron_rpp.observability.rollouts import rollouts_path
from megatron_rpp.observability.writers import read_metrics
from megatron_rpp.reward.services.reward_model import RewardModel
from megatron_rpp.rollout.reward_model_server import LOG_NAME, build_reward_model_server
from megatron_rpp.rollout.reward_reach import check_reach
from tests.integration.conftest import ALPHABET, EOS, PAD
from tests.integration.test_loop import write_problems

LONGEST = 64
SHAPE: dict[str, Any] = {
    "vocab_size": len(ALPHABET) + 1,  # Qwen2's tokenizer adds a token
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.2,  # so that texts differ in their scores
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "num_labels": 1,
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ '*' if m['role'] == 'user' else '-<eos>' }}{% endfor %}"


def save_reward_model(model: torch.nn.Module, tokenizer_dir: Path, path: Path, template: str | None = None) -> Path:
    """`model`, random, with the policy's alphabet."""
    model.save_pretrained(path)  # type: ignore[operator]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


def transformers_scores(path: Path, texts: Sequence[str]) -> list[float]:
    """Of whole texts, as transformers scores them one by one."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        ids = [torch.tensor([tokenizer.encode(text, add_special_tokens=False)]) for text in texts]
        return [float(model(each).logits) for each in ids]


def rollout(prompt: str, text: str) -> Rollout:
    return Rollout(Prompt(0, prompt, (1,), ""), 0, (1,), (0.0,), text, "stop", (VersionSpan(0, 0, 1),))


@pytest.fixture(scope="module")
def qwen2(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a chat template; SGLang's class of it has a bias that transformers' has not."""
    torch.manual_seed(3)
    model = Qwen2ForSequenceClassification(Qwen2Config(**SHAPE))
    return save_reward_model(model, tiny_model_dir, tmp_path_factory.mktemp("qwen2-reward"))


@pytest.fixture(scope="module")
def served(qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Config, str]]:
    """Its server, as a run starts it: (configuration, URL)."""
    run = RunConfig(dir=str(tmp_path_factory.mktemp("served")))
    config = Config(run=run, reward=RewardConfig(kind="model", model_path=str(qwen2)))
    server = build_reward_model_server(config)
    server.start()
    try:
        server.wait_ready()
        yield config, server.url
    finally:
        server.stop()


def test_scores_are_those_of_transformers(served: tuple[Config, str], qwen2: Path) -> None:
    config, url = served
    pairs = [(f"{a}+{b}=", str(a * b) * (a % 4)) for a in range(10) for b in range(4)]
    scores = RewardModel(config.reward, [url])([rollout(*pair) for pair in pairs])
    expected = transformers_scores(qwen2, [prompt + text + "<eos>" for prompt, text in pairs])
    assert scores == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1, "all texts score the same: the test sees nothing"


def test_an_overlong_conversation_loses_the_end_of_its_response(served: tuple[Config, str], qwen2: Path) -> None:
    config, url = served
    reward = RewardModel(config.reward, [url])
    long, short = reward([rollout("1+2=", "12345" * 50), rollout("1+2=", "3")])
    assert reward.metrics().as_dict() == {"reward/clipped_fraction": 0.5}
    (limit,) = {length for length in range(40, LONGEST) if fits(qwen2, long, length)}
    assert LONGEST - 10 < limit < LONGEST, "far less than the server takes was left"
    assert short == pytest.approx(transformers_scores(qwen2, ["1+2=3<eos>"])[0], abs=1e-4)


def fits(path: Path, score: float, length: int) -> bool:
    """Whether `score` is that of the conversation cut to `length` tokens, the end token among them."""
    text = ("1+2=" + "12345" * 50)[: length - 1] + "<eos>"
    return abs(transformers_scores(path, [text])[0] - score) < 1e-5


def test_the_pre_flight_check_tells_a_reward_model_from_nobody(served: tuple[Config, str]) -> None:
    config, url = served
    check_reach(replace(config, reward=replace(config.reward, model_urls=(url,))))
    nobody = "http://127.0.0.1:9"
    with pytest.raises(ConfigError, match=f"reward.model_urls={nobody}: nobody listens at 127.0.0.1:9"):
        check_reach(replace(config, reward=replace(config.reward, model_urls=(url, nobody))))


STEPS = 3
CONFIG = """
run = {{ dir = "{root}/run", steps = {steps}, seed = 5 }}
model = {{ path = "{policy}" }}
parallel = {{ data = 2 }}
algorithm = {{ num_samples_per_prompt = 4, kl_coef = 0.0, reward_clip = 1.5 }}
rollout = {{ num_prompts = 8, max_response_tokens = 6, context_length = 32 }}
train = {{ batch_size = 32, micro_batch_size = 16 }}
optimizer = {{ lr = 1e-2 }}
checkpoint = {{ interval = 0 }}
reward = {{ kind = "model", model_path = "{reward}", normalization = "running", request_deadline_s = 200.0 }}
data = {{ train = {{ kind = "jsonl", path = "{root}/problems.jsonl", size = 40 }} }}
"""


@pytest.fixture(scope="module")
def run(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of two replicas; the reward model's server is killed as soon as the first step is over."""
    root = tmp_path_factory.mktemp("by-reward-model")
    torch.manual_seed(5)
    model = LlamaForSequenceClassification(LlamaConfig(**SHAPE))
    reward = save_reward_model(model, tiny_model_dir, root / "reward", TEMPLATE)
    write_problems(root / "problems.jsonl", 40)
    (root / "run.toml").write_text(CONFIG.format(root=root, policy=tiny_model_dir, reward=reward, steps=STEPS))
    command = [sys.executable, "-m", "megatron_rpp.cli", "train", str(root / "run.toml")]
    with (root / "out.txt").open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        kill_reward_server(process, root / "run")
        assert process.wait(timeout=450) == 0, (root / "out.txt").read_text()[-3000:]
    finally:
        process.terminate()
    return {"root": root, "reward": reward}


def kill_reward_server(process: subprocess.Popen[bytes], run_dir: Path) -> None:
    """After the first step of the run."""
    end = time.monotonic() + 450
    while not rollouts_path(run_dir, 0, 0).exists():
        assert process.poll() is None and time.monotonic() < end, "the first step did not end"
        time.sleep(0.05)
    (server,) = reward_servers(psutil.Process(process.pid))
    os.kill(server, signal.SIGKILL)


def reward_servers(parent: psutil.Process) -> list[int]:
    """Of the servers below `parent`, those that do not generate."""
    found = []
    for child in parent.children(recursive=True):
        line = child.cmdline()
        is_leader = os.getpgid(child.pid) == child.pid  # its workers are forks with the same command line
        if is_leader and "sglang.launch_server" in line and "--is-embedding" in line:
            found.append(child.pid)
    return found


def records(run_dir: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for replica in (0, 1) for line in rollouts_path(run_dir, step, replica).open()]


def test_every_reward_of_a_run_is_the_reward_models_score(run: dict[str, Any]) -> None:
    for step, metrics in enumerate(read_metrics(run["root"] / "run")):
        found = records(run["root"] / "run", step)
        expected = transformers_scores(run["reward"], [f"{r['prompt']}*{r['response']}-<eos>" for r in found])
        rewards = [record["reward"] for record in found]
        assert len(found) == 32 and rewards == pytest.approx(expected, abs=1e-4)
        assert metrics["reward/mean"] == pytest.approx(sum(expected) / 32, abs=1e-4)
        assert metrics["reward/std"] > 0 and metrics["reward/clipped_fraction"] == 0.0


def test_a_run_outlives_the_reward_models_server(run: dict[str, Any]) -> None:
    assert [metrics["step"] for metrics in read_metrics(run["root"] / "run")] == list(range(STEPS))
    log = log_path(run["root"] / "run", 0).read_text()
    assert log.count("the reward model's server is down") == 1 and "killed by SIGKILL" in log
    assert (run["root"] / "run" / "logs" / LOG_NAME).read_text().count("Uvicorn running on") == 2


def test_the_reward_moves_the_policy(run: dict[str, Any]) -> None:
    steps = read_metrics(run["root"] / "run")
    assert all(step["grad_norm"] > 0 for step in steps)
    assert all(step["advantage/std"] == pytest.approx(1, abs=1e-3) for step in steps)


def test_no_reward_server_outlives_its_run(run: dict[str, Any]) -> None:
    left = [p.pid for p in psutil.process_iter() if str(run["reward"]) in " ".join(line_of(p))]
    assert left == []


def line_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() if process.status() != psutil.STATUS_ZOMBIE else []
    except psutil.Error:
        return []
