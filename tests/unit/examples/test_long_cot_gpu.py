"""The example for GPUs is a configuration that can run, and fits the cluster that its head names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.long_cot_balance import QWEN_7B
from megatron_rpp.config.load import load_config
from megatron_rpp.config.schema import Config
from megatron_rpp.config.validate import validate
from megatron_rpp.model.checks import check_model

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "long_cot_gpu.toml"
FILES = {
    "data.sources.competition.path": "competition.parquet",
    "data.sources.textbook.path": "textbook.jsonl",
    "data.evals.aime.path": "aime.jsonl",
    "data.evals.math500.path": "math500.jsonl",
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The example, with paths that exist."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    for name in FILES.values():
        (tmp_path / name).write_text('{"problem": "1 + 1", "answer": "2"}\n')
    paths = [f"--{key}={tmp_path / name}" for key, name in FILES.items()]
    return load_config([str(EXAMPLE)], [f"--model.path={tmp_path}", *paths])


def test_it_passes_every_check_of_rpp_train(config: Config) -> None:
    validate(config, "train")
    check_model(config, "train")


def test_its_ranks_fill_the_nodes_that_are_not_the_servers(config: Config) -> None:
    """As its head says: 8 nodes."""
    trainers = 8 - config.slurm.rollout_nodes
    assert config.parallel.world_size == trainers * config.slurm.gpus_per_node
    assert config.slurm.servers_per_node * config.rollout.server_tensor == config.slurm.gpus_per_node


def test_it_uses_what_long_responses_need(config: Config) -> None:
    assert config.train.micro_batch_tokens >= config.rollout.context_length and config.parallel.context > 1
    assert not config.schedule.is_plain and config.reward.overlong_buffer_tokens > 0
