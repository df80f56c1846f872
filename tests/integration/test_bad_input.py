"""A user's mistake ends with one line on rank 0, exit code 2 and no process left, also where only a rank can tell."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.integration.test_loop import write_config, write_problems


def rpp_train(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_rpp.cli", "train", str(config), *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def config(tiny_model_dir: Path, tmp_path: Path) -> Path:
    write_problems(tmp_path / "problems.jsonl", 40)
    write_problems(tmp_path / "eval.jsonl", 6)
    write_config(tmp_path / "run.toml", tiny_model_dir, tmp_path / "run", tmp_path / "problems.jsonl")
    return tmp_path / "run.toml"


def assert_one_clear_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr[-2000:]
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("rpp: error: "), done.stderr[-2000:]
    for part in parts:
        assert part in lines[0]


def test_missing_model_directory(config: Path) -> None:
    assert_one_clear_line(rpp_train(config, "--model.path=/nowhere"), "model.path=/nowhere")


def test_malformed_line_is_named(config: Path) -> None:
    with (config.parent / "problems.jsonl").open("a") as f:
        f.write('{"prompt": "1+1=", "answer": \n')
    done = rpp_train(config, "--data.train.size=100")
    assert_one_clear_line(done, f"{config.parent / 'problems.jsonl'}:41")


def test_tensor_parallel_that_does_not_divide_the_heads(config: Path) -> None:
    assert_one_clear_line(
        rpp_train(config, "--parallel.tensor=3"), "parallel.tensor=3 must divide num_attention_heads=4"
    )


def test_unknown_key_suggests_the_right_one(config: Path) -> None:
    assert_one_clear_line(rpp_train(config, "--algorithm.kl_coeff=1"), "algorithm.kl_coeff", "algorithm.kl_coef?")


def test_port_taken(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_clear_line(rpp_train(config, f"--rollout.port={port}"), f"rollout.port={port} is in use")


def test_prompt_longer_than_the_context_is_told_by_the_ranks(config: Path) -> None:
    problem = {"prompt": "1+" * 30 + "1=", "answer": "31"}
    (config.parent / "problems.jsonl").write_text((json.dumps(problem) + "\n") * 20)
    before = {p.pid for p in psutil.process_iter()}
    done = rpp_train(config)
    assert_one_clear_line(done, "problems.jsonl:1", "62 tokens", "rollout.context_length")
    left = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before]
    assert not [p for p in left if str(config) in " ".join(p.info["cmdline"] or [])], "a rank was left behind"
