"""A model directory and a data file that pass validation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config import Config
from megatron_rpp.config.fields import build, flatten

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "vocab_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
}

Make = Callable[..., Config]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(MODEL))
    return path


@pytest.fixture
def make(tmp_path: Path, model_dir: Path) -> Make:
    """make({"parallel.tensor": 3}): a valid configuration but for what is passed."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1+1", "answer": "2"}\n')
    valid = {
        "model.path": str(model_dir),
        "data.train.path": str(data),
        "sft.init": str(model_dir),
        "sft.data": str(data),
        "sft.output": str(tmp_path / "warm"),
    }

    def make_config(changes: dict[str, Any] | None = None) -> Config:
        config = build({**valid, **(changes or {})})
        assert dataclasses.is_dataclass(config) and set(flatten(config)) >= set(changes or {})
        return config

    return make_config
