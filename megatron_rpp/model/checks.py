"""Does a model fit its layout and the lengths of the run? Answers before anything is built."""

from __future__ import annotations

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.layout_words import by_keys
from megatron_rpp.config.schema import Config, ParallelConfig
from megatron_rpp.model.fp8_shapes import check_fp8_shapes
from megatron_rpp.model.hf_config import HFConfig, MoE
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.model.speed import check_speed_of_model


def check_model(config: Config, command: str) -> None:
    """What `rpp train` or `rpp sft` asks of its model's config.json. Raises ConfigError."""
    if command == "sft":
        initial = read_hf_config(config.sft.init, "sft.init")
        check_split(config.parallel, initial)
        check_fp8_shapes(config, initial)
        check_speed_of_model(config, initial)
        return
    hf = read_hf_config(config.model.path)
    check_split(config.parallel, hf)
    check_fp8_shapes(config, hf)
    check_speed_of_model(config, hf)
    check_lengths(config, hf)
    server_tensor = config.rollout.server_tensor
    attaches = config.rollout.urls or config.rollout.urls_file  # those say their size themselves
    if not attaches and hf.num_attention_heads % server_tensor:
        heads = f"num_attention_heads={hf.num_attention_heads}"
        raise ConfigError(f"rollout.server_tensor={server_tensor} must divide {heads}")


def check_lengths(config: Config, hf: HFConfig) -> None:
    """The longest sequence fits the model's positions. Raises ConfigError."""
    context = config.rollout.context_length
    if context > hf.max_position_embeddings:
        limit = f"the model's max_position_embeddings={hf.max_position_embeddings}"
        raise ConfigError(f"rollout.context_length={context} must be at most {limit}")


def check_split(parallel: ParallelConfig, hf: HFConfig) -> None:
    """The model divides over tensor, pipeline and expert ranks, as those are set. Raises ConfigError."""
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError("parallel.sequence=true must go with parallel.tensor above 1")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        wanted = f"parallel.virtual_pipeline={parallel.virtual_pipeline}"
        raise ConfigError(f"{wanted} must go with parallel.pipeline above 1")
    sizes = {
        "num_attention_heads": hf.num_attention_heads,
        "num_key_value_heads": hf.num_query_groups,
    }
    if hf.moe is None or not all(hf.moe.layers):
        sizes["intermediate_size"] = hf.ffn_hidden_size
    if hf.moe is not None:
        sizes["the width of shared experts"] = hf.moe.shared_ffn_hidden_size
    for name, size in sizes.items():
        if size % parallel.tensor:
            raise ConfigError(f"parallel.tensor={parallel.tensor} must divide {name}={size}")
    _check_experts(parallel, hf.moe)
    _check_stages(parallel, hf.num_layers)


def _check_experts(parallel: ParallelConfig, moe: MoE | None) -> None:
    """Experts divide over the tensor x context x data ranks of a stage, and each over expert_tensor of them."""
    for name, size in (("expert", parallel.expert), ("expert_tensor", parallel.expert_tensor)):
        if moe is None and size > 1:
            raise ConfigError(f"parallel.{name}={size} must be 1: the model has no experts")
    if moe is None:
        return
    if parallel.tensor > 1 and not parallel.sequence:
        raise ConfigError(
            f"parallel.tensor={parallel.tensor} must go with parallel.sequence=true: the model has experts"
        )
    if moe.num_experts % parallel.expert:
        raise ConfigError(f"parallel.expert={parallel.expert} must divide num_experts={moe.num_experts}")
    if moe.ffn_hidden_size % parallel.expert_tensor:
        width = f"an expert's width, {moe.ffn_hidden_size}"
        raise ConfigError(f"parallel.expert_tensor={parallel.expert_tensor} must divide {width}")
    ranks = parallel.tensor * parallel.context * parallel.data
    if ranks % (parallel.expert * parallel.expert_tensor):
        split = by_keys(parallel, "expert", "expert_tensor")
        raise ConfigError(f"{split} must divide {by_keys(parallel, 'tensor', 'context', 'data')}")


def _check_stages(parallel: ParallelConfig, layers: int) -> None:
    """First and last stage as configured, the others alike; virtual stages alike within each."""
    ends = [held for held in (parallel.first_stage_layers, parallel.last_stage_layers) if held]
    if ends and parallel.pipeline == 1:
        raise ConfigError(
            "parallel.first_stage_layers and parallel.last_stage_layers must go with parallel.pipeline above 1"
        )
    others, left = parallel.pipeline - len(ends), layers - sum(ends)
    if ends and (left < others or (left and not others)):
        asked = f"parallel.first_stage_layers={parallel.first_stage_layers} and parallel.last_stage_layers="
        room = f"must leave at least a layer for each of the {others} other stages" if others else "must be all"
        raise ConfigError(f"{asked}{parallel.last_stage_layers} {room} of num_hidden_layers={layers}")
    if others and left % others:
        stages = f"parallel.pipeline={parallel.pipeline}" + (f" less {len(ends)}" if ends else "")
        counted = f"num_hidden_layers={layers}" + (f" less {sum(ends)}" if ends else "")
        raise ConfigError(f"{stages} must divide {counted}")
    for held in {*ends, *([left // others] if others else [])}:
        if held % parallel.virtual_pipeline:
            raise ConfigError(
                f"parallel.virtual_pipeline={parallel.virtual_pipeline} must divide the {held} layers of each stage "
                f"(num_hidden_layers={layers}, parallel.pipeline={parallel.pipeline})"
            )
