"""What each setting may be, taken by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fields import canonical, fields
from megatron_rpp.config.toml_text import written

LR_SCHEDULES = ("constant", "linear", "cosine")
_SOURCES = ("data.train", "data.sources.NAME", "data.evals.NAME")

CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("float32", "bfloat16"),
    "model.layer_spec": ("auto", "te", "local"),
    "model.mtp": ("keep", "drop"),
    "algorithm.estimator": ("reinforce_pp", "reinforce_pp_baseline", "grpo", "dr_grpo", "rloo", "remax"),
    "algorithm.kl_placement": ("to_go", "folded", "instant", "none"),
    "algorithm.kl_estimator": ("k1", "k2", "k3"),
    "algorithm.lone_sample": ("zero", "raw"),
    "algorithm.variance_floor": ("clamp", "add"),
    "algorithm.loss_aggregation": ("token_mean", "sequence_mean", "constant"),
    "algorithm.kl_loss_estimator": ("k2", "k3"),
    "algorithm.importance_correction": ("off", "truncated", "masked", "sequence_masked"),
    "reward.normalization": ("none", "group", "running"),
    "reward.format": ("none", "boxed", "think", "pattern"),
    "reward.kind": ("math_answer", "reasoning_gym", "model", "remote", "function"),
    **{f"{source}.kind": ("jsonl", "parquet", "huggingface", "reasoning_gym") for source in _SOURCES},
    "data.curriculum": ("none", "easy_first"),
    "optimizer.lr_schedule": LR_SCHEDULES,
    "train.fused_logprobs": ("auto", "on", "off"),
    "fp8.recipe": ("none", "delayed", "tensorwise", "blockwise", "mxfp8"),
    "fp8.format": ("hybrid", "e4m3"),
    "memory.offload": ("optimizer", "gradients", "reference"),
    "memory.recompute": ("none", "selective", "full"),
    "memory.recompute_modules": (
        "core_attn",
        "mlp",
        "moe",
        "moe_act",
        "layernorm",
        "mla_up_proj",
        "shared_experts",
    ),
    "profile.record": ("trace", "memory", "nvtx"),
    "sft.lr_schedule": LR_SCHEDULES,
    "weight_sync.transports": ("broadcast", "disk", "ipc", "delta"),
    "weight_sync.dtype": ("auto", "float32", "bfloat16", "float8"),
    "weight_sync.verify": ("full", "sample", "off"),
    "weight_sync.pause": ("drain", "abort", "retract"),
    "rollout.record": ("resume", "all", "off"),
    "slurm.container_runtime": ("pyxis", "apptainer"),
}


@dataclass(frozen=True)
class Range:
    """A condition, in words and as code."""

    words: str
    holds: Callable[[Any], bool]


AT_LEAST_1 = Range("at least 1", lambda x: x >= 1)
NOT_NEGATIVE = Range("at least 0", lambda x: x >= 0)
ZERO_OR_ONE = Range("0 or 1", lambda x: x in (0, 1))
ZERO_OR_ABOVE_1 = Range("above 1, or 0 to turn it off", lambda x: x == 0 or x > 1)
POSITIVE = Range("above 0", lambda x: x > 0)
FRACTION = Range("between 0 and 1", lambda x: 0 <= x <= 1)
BELOW_1 = Range("at least 0 and below 1", lambda x: 0 <= x < 1)
NONZERO_FRACTION = Range("above 0 and at most 1", lambda x: 0 < x <= 1)
PORT = Range("a port from 1 to 65535, or 0 for a free one", lambda x: 0 <= x <= 65535)
NOT_EMPTY = Range("set", lambda x: x != "")

RANGES: dict[Range, tuple[str, ...]] = {
    NOT_EMPTY: ("run.dir",),
    AT_LEAST_1: (
        "algorithm.importance_high",
        "run.steps",
        "model.vocab_divisor",
        "parallel.tensor",
        "parallel.pipeline",
        "parallel.virtual_pipeline",
        "parallel.context",
        "parallel.data",
        "parallel.expert",
        "parallel.expert_tensor",
        "algorithm.num_samples_per_prompt",
        "algorithm.kl_horizon",
        "rollout.num_prompts",
        "rollout.max_response_tokens",
        "rollout.context_length",
        "rollout.num_servers",
        "rollout.server_tensor",
        "rollout.max_total_tokens",
        "rollout.max_concurrent_requests",
        "schedule.over_sampling",
        "schedule.max_draws",
        "train.batch_size",
        "train.micro_batch_size",
        "train.logprob_chunk_tokens",
        "fp8.amax_history",
        "reward.memory_limit_mb",
        "reward.workers",
        "weight_sync.bucket_mb",
        "weight_sync.delta_full_every",
        "parity.responses",
        "eval.num_prompts",
        "checkpoint.keep",
        "slurm.servers_per_node",
        "slurm.max_tries",
        "sft.steps",
        "sft.batch_size",
        "eval.samples",
        "eval.pass_at",
    ),
    NOT_NEGATIVE: (
        "run.seed",
        "fp8.bf16_first_layers",
        "fp8.bf16_last_layers",
        "profile.steps",
        "profile.ranks",
        "train.micro_batch_tokens",
        "parallel.first_stage_layers",
        "parallel.last_stage_layers",
        *(f"{source}.{key}" for source in _SOURCES for key in ("seed", "size", "weight")),
        "algorithm.kl_coef",
        "algorithm.kl_clamp",
        "algorithm.kl_output_clamp",
        "algorithm.kl_target",
        "algorithm.reward_clip",
        "algorithm.clip_eps_high",
        "algorithm.log_ratio_clamp",
        "algorithm.loss_constant",
        "algorithm.kl_loss_coef",
        "algorithm.entropy_coef",
        "reward.overlong_buffer_tokens",
        "reward.overlong_penalty",
        "reward.max_retries",
        "rollout.max_retries",
        "rollout.restart_backoff_s",
        "schedule.max_deferrals",
        "schedule.time_budget_s",
        "schedule.token_budget",
        "parity.warn",
        "parity.correct",
        "parity.stop",
        "optimizer.lr",
        "optimizer.min_lr",
        "optimizer.warmup_steps",
        "optimizer.weight_decay",
        "optimizer.clip_grad",
        "eval.interval",
        "checkpoint.interval",
        "checkpoint.keep_every",
        "slurm.gpus_per_node",
        "slurm.rollout_nodes",
        "slurm.checkpoint_before_end_s",
        "sft.lr",
        "sft.min_lr",
        "sft.warmup_steps",
    ),
    POSITIVE: (
        "rollout.temperature",
        "rollout.startup_deadline_s",
        "rollout.request_deadline_s",
        "rollout.health_deadline_s",
        "reward.time_limit_s",
        "reward.batch_time_limit_s",
        "reward.request_deadline_s",
        "optimizer.adam_eps",
        "weight_sync.deadline_s",
        "watchdog.heartbeat_deadline_s",
        "watchdog.stall_deadline_s",
    ),
    ZERO_OR_ONE: ("algorithm.variance_ddof",),
    ZERO_OR_ABOVE_1: ("algorithm.dual_clip",),
    FRACTION: (
        "algorithm.gamma",
        "algorithm.importance_low",
        *(f"{source}.{key}" for source in _SOURCES for key in ("min_pass_rate", "max_pass_rate")),
    ),
    BELOW_1: ("algorithm.clip_eps_low", "optimizer.adam_beta1", "optimizer.adam_beta2"),
    NONZERO_FRACTION: ("rollout.top_p",),
    PORT: ("rollout.port",),
}


_RANGE_OF = {key: wanted for wanted, keys in RANGES.items() for key in keys}


def check_ranges(values: Mapping[str, Any]) -> None:
    """Every setting, by dotted key, is one of its choices or within its range. Raises ConfigError."""
    for key, value in values.items():
        known = canonical(key)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, float) and not math.isfinite(each):
                raise ConfigError(f"{key}={each} must be a finite number")
            if known in CHOICES and each not in CHOICES[known]:
                raise ConfigError(f"{key}={each} must be one of: {', '.join(CHOICES[known])}")
            if known in _RANGE_OF and not _RANGE_OF[known].holds(each):
                raise ConfigError(f"{key}={each} must be {_RANGE_OF[known].words}")


def require_distinct(key: str, values: Sequence[Any]) -> None:
    """Raises ConfigError where a list names something twice."""
    if len(set(values)) < len(values):
        raise ConfigError(f"{key}={written(tuple(values))} names one twice; name each once")


def unchecked_numbers() -> list[str]:
    """The numeric settings that no range covers."""
    return [key for key, item in fields().items() if item.type in (int, float) and key not in _RANGE_OF]
