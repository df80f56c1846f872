"""What the model's own config.json must say before it can be built and split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.schema import ParallelConfig

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Hugging Face architectures that have a mapping table."""


def read_model_config(key: str, path: str) -> dict[str, Any]:
    """The config.json of the Hugging Face directory that setting `key` names.

    Raises:
        ConfigError: nothing there, not JSON, or an architecture that has no mapping table.
    """
    if not path:
        raise ConfigError(f"{key} is not set; pass --{key}=DIRECTORY of a Hugging Face model")
    if not Path(path).is_dir():
        raise ConfigError(f"{key}={path} must be an existing directory of a Hugging Face model")
    try:
        model = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{key}={path} must hold a readable config.json: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{key}={path} must hold a valid config.json: {error}") from error
    named = model.get("architectures") if isinstance(model, dict) else None
    if not named or named[0] not in ARCHITECTURES:
        found = named[0] if named else "none named"
        raise ConfigError(f"{key}={path} has architecture {found}; it must be one of: {', '.join(ARCHITECTURES)}")
    return model


def check_split(parallel: ParallelConfig, model: dict[str, Any]) -> None:
    """The model divides evenly over tensor and pipeline ranks. Raises ConfigError."""
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError("parallel.sequence=true must go with parallel.tensor above 1")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        wanted = f"parallel.virtual_pipeline={parallel.virtual_pipeline}"
        raise ConfigError(f"{wanted} must go with parallel.pipeline above 1")
    heads = _size(model, "num_attention_heads")
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": model.get("num_key_value_heads") or heads,
        "intermediate_size": _size(model, "intermediate_size"),
    }
    for name, size in sizes.items():
        if size % parallel.tensor:
            raise ConfigError(f"parallel.tensor={parallel.tensor} must divide {name}={size}")
    layers = _size(model, "num_hidden_layers")
    if layers % (parallel.pipeline * parallel.virtual_pipeline):
        chunks = f"parallel.pipeline={parallel.pipeline}"
        if parallel.virtual_pipeline > 1:
            chunks += f" x parallel.virtual_pipeline={parallel.virtual_pipeline}"
        raise ConfigError(f"{chunks} must divide num_hidden_layers={layers}")


def _size(model: dict[str, Any], name: str) -> int:
    size = model.get(name)
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"the model's config.json has {name}={size}; it must be a positive number")
    return size
