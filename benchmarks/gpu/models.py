"""Dense models of known shapes with random weights, built on this rank's device without a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_rpp.config.schema import Config
from megatron_rpp.model.build import Model, build_empty
from megatron_rpp.model.fp8_params import fill
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.parallel.context import ParallelContext

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 500_000.0, "rms_norm_eps": 1e-5}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_theta": 1e6, "rms_norm_eps": 1e-6}
SHAPES: dict[str, dict[str, Any]] = {  # as their authors' config.json
    "llama-1b": {
        **_LLAMA, "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        **_QWEN3, "num_hidden_layers": 36, "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
    },
    "tiny": {
        **_LLAMA, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def shape(name: str, folder: Path) -> HFConfig:
    """SHAPES[name], read as a model's directory is; its config.json stays in FOLDER/name."""
    path = folder / name
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(SHAPES[name]))
    return read_hf_config(str(path))


def random_model(hf: HFConfig, config: Config, parallel: ParallelContext) -> Model:
    """A model of that shape: matrices of deviation 0.02, norms of ones."""
    model = build_empty(hf, config, parallel)
    torch.manual_seed(0)
    with torch.no_grad():
        for chunk in model.chunks:
            for parameter in chunk.parameters():
                value = torch.ones(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                fill(parameter, value if parameter.dim() == 1 else value.normal_(std=0.02))
    return model


def parameter_count(model: Model) -> int:
    """Of this rank."""
    return sum(parameter.numel() for chunk in model.chunks for parameter in chunk.parameters())
