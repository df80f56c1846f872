"""Keys that act only beside others: set without them, they would be passed over in silence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_rpp.config.data import SourceConfig
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fields import canonical, fields, flatten
from megatron_rpp.config.schema import Config
from megatron_rpp.config.sources import gives_verdicts, held_out_sources, named_sources, reward_kinds
from megatron_rpp.config.toml_text import written


@dataclass(frozen=True)
class Need:
    """A condition, in words and as code."""

    words: str
    is_met: Callable[[Config], bool]


def _reward_kind(kind: str) -> Need:
    return Need(f"reward.kind={kind}, or such a reward of a source", lambda config: kind in reward_kinds(config))


def _has_verdicts(config: Config) -> bool:
    """A held-out set that pass@k can be told of; or nothing is evaluated now."""
    sets = held_out_sources(config).values()
    return not config.eval.interval or any(gives_verdicts(config, source) for source in sets)


_FP8 = Need("fp8.recipe, such as blockwise", lambda config: config.fp8.is_on)
_PROFILE = Need("profile.steps, such as 3", lambda config: bool(config.profile.steps))

NEEDS: dict[str, Need] = {
    **{f"fp8.{key}": _FP8 for key in ("format", "params", "bf16_first_layers", "bf16_last_layers")},
    "fp8.amax_history": Need("fp8.recipe=delayed", lambda config: config.fp8.recipe == "delayed"),
    "memory.recompute_modules": Need(
        "memory.recompute=selective", lambda config: config.memory.recompute == "selective"
    ),
    "profile.ranks": _PROFILE,
    "profile.record": _PROFILE,
    "eval.pass_at": Need(
        "a set of data.evals whose rewards are verdicts, by kind math_answer or reasoning_gym or its verdicts=true",
        _has_verdicts,
    ),
    "reward.function": _reward_kind("function"),
    "reward.url": _reward_kind("remote"),
    "reward.model_path": _reward_kind("model"),
    "reward.model_urls": _reward_kind("model"),
    "reward.model_server_args": _reward_kind("model"),
    "reward.format_pattern": Need("reward.format=pattern", lambda config: config.reward.format == "pattern"),
    "reward.format_reward": Need("reward.format, such as boxed", lambda config: config.reward.format != "none"),
    "reward.overlong_penalty": Need(
        "reward.overlong_buffer_tokens above 0", lambda config: config.reward.overlong_buffer_tokens > 0
    ),
    "train.logprob_chunk_tokens": Need(
        "train.fused_logprobs=off or auto", lambda config: config.train.fused_logprobs != "on"
    ),
    "schedule.max_draws": Need("schedule.dynamic_sampling=true", lambda config: config.schedule.dynamic_sampling),
    "schedule.max_deferrals": Need(
        "schedule.over_sampling above 1, schedule.dynamic_sampling or a budget of `schedule`",
        lambda config: not config.schedule.is_plain,
    ),
}

SOURCE_NEEDS: dict[str, tuple[str, Callable[[SourceConfig], bool]]] = {
    "path": ("jsonl, parquet or huggingface", lambda source: source.kind != "reasoning_gym"),
    "split": ("huggingface; choose files of other kinds by path", lambda source: source.kind == "huggingface"),
    "task": ("reasoning_gym", lambda source: source.kind == "reasoning_gym"),
    "task_args": ("reasoning_gym", lambda source: source.kind == "reasoning_gym"),
    "seed": ("reasoning_gym", lambda source: source.kind == "reasoning_gym"),
}


def check_needs(config: Config) -> None:
    """Raises ConfigError for the first key that differs from its default and cannot act."""
    sources = named_sources(config.data)
    for key, value in flatten(config).items():
        known = canonical(key)
        if value == fields()[known].default:
            continue
        section, _, name = key.rpartition(".")
        if known in NEEDS and not NEEDS[known].is_met(config):
            raise ConfigError(f"{key}={written(value)} must go with {NEEDS[known].words}; else it does nothing")
        if section in sources and name in SOURCE_NEEDS and not SOURCE_NEEDS[name][1](sources[section]):
            kinds = SOURCE_NEEDS[name][0]
            raise ConfigError(f"{key}={written(value)} must go with {section}.kind={kinds}; else it does nothing")
