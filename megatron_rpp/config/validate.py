"""Is this configuration one that can run? Answers before anything expensive; imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_rpp.config.algorithm_checks import check_algorithm
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fields import flatten
from megatron_rpp.config.fp8_checks import check_fp8
from megatron_rpp.config.memory_checks import check_offload
from megatron_rpp.config.needs import check_needs
from megatron_rpp.config.ranges import check_ranges, require_distinct
from megatron_rpp.config.reward_checks import check_rewards
from megatron_rpp.config.schema import Config
from megatron_rpp.config.server_arg_checks import check_server_args
from megatron_rpp.config.sources import check_sources
from megatron_rpp.config.speed_checks import check_profile, check_speed
from megatron_rpp.config.templates import DEFAULT, check_chat_template_args, check_template
from megatron_rpp.config.toml_text import written
from megatron_rpp.config.urls import is_url

Command = Literal["train", "sft"]


def validate(config: Config, command: Command) -> None:
    """Everything that can be told from the configuration and the files that it names.

    Looks at paths; config.json of the model is `megatron_rpp.model.checks`', the lines of JSONL files are
    `megatron_rpp.data.jsonl`'s, and what only one host can tell is `preflight`'s.

    Raises:
        ConfigError: the first value that must change, and to what.
    """
    check_ranges(flatten(config))
    check_template(DEFAULT, config.data.prompt_template)
    check_chat_template_args(config.data)
    check_packing(config)
    check_fp8(config)
    check_speed(config)
    if command == "sft":
        _check_sft(config)
        return
    if config.reward.correct == config.reward.wrong:
        raise ConfigError(f"reward.correct={config.reward.correct} must differ from reward.wrong")
    check_algorithm(config)
    check_offload(config)
    check_profile(config)
    _check_batches(config)
    _check_lengths(config)
    _check_schedule(config)
    _check_servers(config)
    _check_weight_sync(config)
    check_server_args(config)
    _check_parity(config)
    check_sources(config)
    check_rewards(config)
    _check_evaluation(config)
    check_needs(config)
    _check_learning_rate("optimizer", config.optimizer.lr, config.optimizer.min_lr)


def check_packing(config: Config) -> None:
    """Context parallelism splits packed sequences, and a microbatch has room for the longest. Raises ConfigError."""
    tokens, longest, context = config.train.micro_batch_tokens, config.rollout.context_length, config.parallel.context
    if context > 1 and not tokens:
        wanted = f"train.micro_batch_tokens, such as {longest}: packed sequences are what it splits"
        raise ConfigError(f"parallel.context={context} must go with {wanted}")
    if 0 < tokens < longest:
        raise ConfigError(f"train.micro_batch_tokens={tokens} must be at least rollout.context_length={longest}")


def _check_sft(config: Config) -> None:
    sft = config.sft
    for key, value in (("memory.offload", config.memory.offload), ("profile.steps", config.profile.steps)):
        if value:
            raise ConfigError(f"{key}={written(value)} is for `rpp train`, and nothing in `rpp sft`; leave it empty")
    _require_file("sft.data", sft.data)
    if not sft.output:
        raise ConfigError("sft.output is not set; pass --sft.output=DIRECTORY for the trained model")
    if Path(sft.output).resolve() == Path(sft.init).resolve():
        raise ConfigError(f"sft.output={sft.output} must differ from sft.init")
    _require_divisor("parallel.data", config.parallel.data, "sft.batch_size", sft.batch_size)
    _check_learning_rate("sft", sft.lr, sft.min_lr)


def _check_batches(config: Config) -> None:
    """The engine pads a short last micro-batch, so micro_batch_size need not divide anything."""
    data, prompts, batch = config.parallel.data, config.rollout.num_prompts, config.train.batch_size
    samples = config.algorithm.num_samples_per_prompt
    _require_divisor("parallel.data", data, "rollout.num_prompts", prompts)
    _require_divisor("parallel.data", data, "train.batch_size", batch)
    if prompts * samples % batch:
        step = f"rollout.num_prompts={prompts} x algorithm.num_samples_per_prompt={samples}"
        raise ConfigError(f"train.batch_size={batch} must divide {step} = {prompts * samples}")


def _check_lengths(config: Config) -> None:
    context, longest = config.rollout.context_length, config.rollout.max_response_tokens
    if longest >= context:
        raise ConfigError(
            f"rollout.max_response_tokens={longest} must be below rollout.context_length={context}, "
            "which holds the prompt too"
        )


def _check_schedule(config: Config) -> None:
    schedule, samples = config.schedule, config.algorithm.num_samples_per_prompt
    if schedule.dynamic_sampling and samples < 2:
        raise ConfigError(
            f"schedule.dynamic_sampling=true compares the responses to a prompt, and algorithm.num_samples_per_prompt"
            f"={samples}; raise it to 2 at least"
        )
    if schedule.dynamic_sampling and schedule.max_draws < schedule.over_sampling:
        raise ConfigError(
            f"schedule.max_draws={schedule.max_draws} must be at least schedule.over_sampling={schedule.over_sampling}"
        )
    if schedule.time_budget_s >= config.rollout.request_deadline_s:
        raise ConfigError(
            f"schedule.time_budget_s={schedule.time_budget_s:g} must be below rollout.request_deadline_s="
            f"{config.rollout.request_deadline_s:g}, which ends the sampling with an error"
        )


def _check_servers(config: Config) -> None:
    rollout = config.rollout
    known: set[str] = set()
    for url in rollout.urls:
        if not is_url(url):
            raise ConfigError(f"rollout.urls={url} must be a URL such as http://host:30000")
        if url.rstrip("/") in known:
            raise ConfigError(f"rollout.urls names {url} twice; name each server once")
        known.add(url.rstrip("/"))
    if rollout.urls_file:
        _require_file("rollout.urls_file", rollout.urls_file)
    ways = [name for name in ("urls", "urls_file", "registry") if getattr(rollout, name)]
    if len(ways) > 1:
        raise ConfigError(f"rollout.{ways[0]} and rollout.{ways[1]} are both set; name the servers in one way")
    if rollout.port and rollout.port + rollout.num_servers - 1 > 65535:
        raise ConfigError(f"rollout.port={rollout.port} leaves no ports for rollout.num_servers={rollout.num_servers}")


def _check_weight_sync(config: Config) -> None:
    sync = config.weight_sync
    if not sync.transports:
        raise ConfigError("weight_sync.transports is empty; name at least one, such as broadcast")
    require_distinct("weight_sync.transports", sync.transports)
    if "delta" in sync.transports and config.rollout.release_memory:
        raise ConfigError(
            "weight_sync.transports=delta changes the weights that servers hold, and rollout.release_memory=true "
            "throws them away; choose one"
        )


def _check_parity(config: Config) -> None:
    correct, stop = config.parity.correct, config.parity.stop
    if correct >= stop > 0:
        raise ConfigError(
            f"parity.correct={correct} must be below parity.stop={stop}, above which the run ends; or set either to 0"
        )


def _check_evaluation(config: Config) -> None:
    asked, samples = config.eval.pass_at, config.eval.samples
    largest = max(asked, default=1)
    if largest > samples:
        raise ConfigError(f"eval.pass_at={largest} must be at most eval.samples={samples}")
    if len(set(asked)) < len(asked):
        raise ConfigError(f"eval.pass_at={','.join(map(str, asked))} names a number twice; name each once")


def _check_learning_rate(section: str, peak: float, end: float) -> None:
    if end > peak:
        raise ConfigError(f"{section}.min_lr={end} must be at most {section}.lr={peak}")


def _require_file(key: str, path: str) -> None:
    if not path:
        raise ConfigError(f"{key} is not set; pass --{key}=FILE.jsonl")
    if not Path(path).is_file():
        raise ConfigError(f"{key}={path} must be an existing file")


def _require_divisor(key: str, divisor: int, whole_key: str, whole: int) -> None:
    if whole % divisor:
        raise ConfigError(f"{key}={divisor} must divide {whole_key}={whole}")
