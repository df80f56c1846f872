"""Recomputed activations and CUDA graphs, in Megatron's settings."""

from __future__ import annotations

from typing import Any

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.schema import Config
from megatron_rpp.config.speed_checks import IN_ATTENTION_OF_MLA, IN_EXPERTS
from megatron_rpp.model.hf_config import HFConfig


def speed_settings(config: Config, layer_spec: str) -> dict[str, Any]:
    """TransformerConfig arguments. Raises ConfigError where `layer_spec`, as it was resolved here, has no graphs."""
    if config.train.cuda_graphs and layer_spec != "te":
        raise ConfigError("train.cuda_graphs=true must go with GPUs and Transformer Engine, which are not here")
    graphs = {"cuda_graph_impl": "local"} if config.train.cuda_graphs else {}
    if config.memory.recompute == "full":
        # Each layer by itself keeps its input alone; several as one would save inputs and hold more at a time.
        layers = {"recompute_method": "uniform", "recompute_num_layers": 1}
        return {**graphs, "recompute_granularity": "full", **layers}
    if config.memory.recompute == "selective":
        modules = list(config.memory.recompute_modules)
        return {**graphs, "recompute_granularity": "selective", "recompute_modules": modules}
    return graphs


def check_speed_of_model(config: Config, hf: HFConfig) -> None:
    """The model has the modules that are to be recomputed, and can be a graph. Raises ConfigError."""
    if config.memory.recompute == "selective":
        for module in config.memory.recompute_modules:
            _check_module(module, config, hf)
    if config.train.cuda_graphs and hf.moe is not None:
        raise ConfigError(
            "train.cuda_graphs=true must go with a model without experts: the host must know how many tokens each gets"
        )


def _check_module(module: str, config: Config, hf: HFConfig) -> None:
    """Megatron passes over most names of modules that a model does not have."""
    key, moe = f"memory.recompute_modules={module}", hf.moe
    if module == IN_ATTENTION_OF_MLA and hf.mla is None:
        raise ConfigError(f"{key} must go with a model of latent attention (MLA)")
    if module in IN_EXPERTS and moe is None:
        raise ConfigError(f"{key} must go with a model that has experts")
    if module == "shared_experts" and moe is not None and not moe.shared_ffn_hidden_size:
        raise ConfigError(f"{key} must go with a model that has shared experts")
    if module == "mlp" and moe is not None and all(moe.layers):
        raise ConfigError(f"{key} must go with a model that has layers without experts; name moe")
    if module == "moe_act" and config.model.layer_spec == "local":
        raise ConfigError(f"{key} must go with model.layer_spec=te, whose experts are one grouped product")
