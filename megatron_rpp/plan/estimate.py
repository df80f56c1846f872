"""From a configuration to a plan."""

from __future__ import annotations

from dataclasses import replace

from megatron_rpp import device
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fp8_checks import check_fp8
from megatron_rpp.config.layout_words import by_keys
from megatron_rpp.config.memory_checks import check_offload
from megatron_rpp.config.schema import Config, ModelConfig, ParallelConfig
from megatron_rpp.config.speed_checks import check_speed
from megatron_rpp.config.validate import check_packing
from megatron_rpp.model.checks import check_lengths, check_split
from megatron_rpp.model.fp8_shapes import check_fp8_shapes
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.model.hf_mapping.mtp import without_mtp
from megatron_rpp.model.server_weights import server_dtype
from megatron_rpp.model.speed import check_speed_of_model
from megatron_rpp.plan.memory import GRADIENT, RESERVE_BYTES, Plan, Servers
from megatron_rpp.plan.parts import count_parts, kinds_of
from megatron_rpp.plan.stages import stage_memory
from megatron_rpp.plan.warn import warnings_of

GPUS_PER_NODE = 8  # where slurm.gpus_per_node is silent


def plan(config: Config, gpus: int | None = None) -> Plan:
    """The memory of `config` on `gpus` trainer GPUs (None: as many as its layout has ranks).

    Needs config.json of model.path and nothing else of it. Must not be called by a rank of a job.

    Raises:
        ConfigError: what `rpp train` refuses of model, layout, lengths, FP8, recomputation, graphs and off-loading;
            or the layout does not divide over `gpus`.
    """
    hf = without_mtp(read_hf_config(config.model.path))
    given, config = config, replace(config, parallel=_on_gpus(config, gpus))
    check_split(config.parallel, hf)
    check_lengths(config, hf)
    check_packing(config)
    check_fp8(config)
    check_fp8_shapes(config, hf)
    check_speed(config)
    check_speed_of_model(config, hf)
    check_offload(config)
    _check_batches(config)
    parallel, stages = config.parallel, tuple(stage_memory(hf, config))
    total, _ = total_parameters(hf, config.model)
    found = Plan(
        gpus=parallel.world_size,
        gpus_per_node=config.slurm.gpus_per_node or GPUS_PER_NODE,
        layout=parallel,
        total_parameters=total,
        stages=stages,
        servers=_servers(config, hf, total),
    )
    return replace(found, warnings=tuple(warnings_of(found, given)))


def total_parameters(hf: HFConfig, model: ModelConfig) -> tuple[int, int]:
    """(of the whole model, of its experts), as its authors count: nothing padded or copied, and no MTP layers."""
    parts = count_parts(hf, Config(model=replace(model, vocab_divisor=1, layer_spec="local")))
    held = [parts.embedding, *(parts.layers[kind] for kind in kinds_of(hf)), parts.norm, parts.output]
    experts = sum(sum(part.experts) for part in held)
    return experts + sum(sum(part.dense) for part in held), experts


def least_bytes(config: Config, total: int, experts: int) -> float:
    """No layout like config's needs less on its fullest rank: weights and gradients, shared out evenly. Quick to tell.

    total, experts: `total_parameters`.
    """
    parallel = config.parallel
    held = (total - experts) / parallel.tensor + experts / (parallel.expert * parallel.expert_tensor)
    copies = 2 if config.algorithm.uses_reference and "reference" not in config.memory.offload else 1
    each = copies * device.dtype(config.model.dtype).itemsize + GRADIENT
    return held / parallel.pipeline * each + RESERVE_BYTES


def _on_gpus(config: Config, gpus: int | None) -> ParallelConfig:
    parallel = config.parallel
    if gpus is None:
        return parallel
    replica = parallel.tensor * parallel.pipeline * parallel.context
    if gpus < 1 or gpus % replica:
        split = by_keys(parallel, "tensor", "pipeline", "context")
        raise ConfigError(f"--gpus={gpus} must be a multiple of {split} = {replica}")
    return replace(parallel, data=gpus // replica)


def _check_batches(config: Config) -> None:
    """What `rpp train` asks of the data-parallel size, which here may follow from --gpus."""
    data = config.parallel.data
    sizes = {"rollout.num_prompts": config.rollout.num_prompts, "train.batch_size": config.train.batch_size}
    for key, size in sizes.items():
        if size % data:
            raise ConfigError(f"{key}={size} must be a multiple of the data-parallel size, {data}")


def shares_gpus(config: Config) -> bool:
    """Whether SGLang runs on the trainer's GPUs: spawned, or of the same SLURM job on the same nodes."""
    return not (config.rollout.urls or config.rollout.urls_file or config.slurm.rollout_nodes)


def _servers(config: Config, hf: HFConfig, total: int) -> Servers | None:
    rollout = config.rollout
    if not shares_gpus(config):
        return None
    width = {"float32": 4, "bfloat16": 2, "float8": 1}
    return Servers(total * width[server_dtype(config, hf)] // rollout.server_tensor, rollout.release_memory)
