"""Which settings of speed, recomputation and profiling go together."""

from __future__ import annotations

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.ranges import require_distinct
from megatron_rpp.config.schema import Config
from megatron_rpp.config.toml_text import written

IN_ATTENTION_OF_MLA, IN_EXPERTS = "mla_up_proj", ("moe", "moe_act", "shared_experts")
"""What memory.recompute_modules may name of models that have it."""


def check_speed(config: Config) -> None:
    """Raises ConfigError for the first that cannot be, by Megatron's rules or by ours."""
    _check_overlap(config)
    _check_recompute(config)
    _check_graphs(config)


def _check_overlap(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.overlap_param_gather and not optimizer.distributed:
        raise ConfigError(
            "optimizer.overlap_param_gather=true must go with optimizer.distributed=true: else nothing is gathered"
        )
    if optimizer.overlap_param_gather and not optimizer.overlap_grad_reduce:
        raise ConfigError("optimizer.overlap_param_gather=true must go with optimizer.overlap_grad_reduce=true")


def _check_recompute(config: Config) -> None:
    modules = config.memory.recompute_modules
    if config.memory.recompute != "selective":
        return
    if not modules:
        raise ConfigError("memory.recompute_modules is empty; name one, such as core_attn, or set memory.recompute")
    require_distinct("memory.recompute_modules", modules)


def _check_graphs(config: Config) -> None:
    """A graph is replayed on tensors of one shape at one address, in one order."""
    if not config.train.cuda_graphs:
        return
    wrong = {
        "model.layer_spec=local": (config.model.layer_spec == "local", "te"),
        f"train.micro_batch_tokens={config.train.micro_batch_tokens}": (config.train.micro_batch_tokens > 0, "0"),
        f"parallel.pipeline={config.parallel.pipeline}": (config.parallel.pipeline > 1, "1"),
        f"memory.recompute={config.memory.recompute}": (config.memory.recompute != "none", "none"),
        "memory.offload=gradients": ("gradients" in config.memory.offload, "other tensors or none"),
    }
    for setting, (refused, instead) in wrong.items():
        if refused:
            raise ConfigError(f"{setting} must be {instead} where train.cuda_graphs=true")


def check_profile(config: Config) -> None:
    """Of `rpp train`. Raises ConfigError."""
    profile, ranks = config.profile, config.parallel.world_size
    if not profile.steps:
        return
    for name in ("steps", "ranks", "record"):
        require_distinct(f"profile.{name}", getattr(profile, name))
    if max(profile.steps) >= config.run.steps:
        raise ConfigError(f"profile.steps={max(profile.steps)} must be below run.steps={config.run.steps}")
    if not profile.ranks or max(profile.ranks) >= ranks:
        named = written(profile.ranks) or "(none)"
        raise ConfigError(f"profile.ranks={named} must name some of the {ranks} ranks, from 0 to {ranks - 1}")
    if not profile.record:
        raise ConfigError("profile.record is empty; name one, such as trace")
    if {"trace", "nvtx"} <= set(profile.record):
        raise ConfigError("profile.record=trace,nvtx: the GPU's profiler serves one of them at a time; choose one")
