"""`rpp train` and `rpp sft`: starts the ranks on this host, or is one of a launcher's ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

from megatron_rpp.commands.check import check_prompts
from megatron_rpp.commands.messages import error_line, user_error
from megatron_rpp.commands.words import split
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.job import Resume
from megatron_rpp.config.layout_words import by_keys, in_short
from megatron_rpp.config.load import describe, load_config
from megatron_rpp.config.preflight import check_host, make_folders
from megatron_rpp.config.reward_checks import spawns_reward_model
from megatron_rpp.config.schema import Config
from megatron_rpp.config.sources import held_out_sources, is_verified, training_sources
from megatron_rpp.config.templates import template_names
from megatron_rpp.config.validate import validate
from megatron_rpp.parallel.environment import JobPlace, find_rank
from megatron_rpp.parallel.exit_codes import ERROR_PREFIX, INTERRUPTED
from megatron_rpp.parallel.local_launch import launch_local

# By name: most of their modules import torch.
_CLEAR_ERRORS = {"RolloutError", "RewardError", "WeightSyncError", "ParityError", "TakenOver"}


@dataclass(frozen=True)
class Arguments:
    """A `train` or `sft` command line."""

    command: Literal["train", "sft"]
    files: tuple[str, ...]
    overrides: tuple[str, ...]
    resume: Resume
    check: bool = False


def parse(words: Sequence[str]) -> Arguments:
    """`train` or `sft`, its files, its overrides, --check, --resume or --resume=auto. Raises ConfigError, HelpAsked."""
    command = cast(Literal["train", "sft"], words[0])
    given = split(words[1:], _usage(command), flags=("--resume", "--resume=auto", "--check"))
    resuming = [option for option in given.options if option != "--check"]
    unknown = [word for word in given.overrides if word.startswith("--resume=")]
    if command == "sft" and (resuming or unknown):
        raise ConfigError("--resume is for `rpp train`; `rpp sft` starts over")
    if unknown:
        choice = "write --resume to continue a run, or --resume=auto to start it where there is none"
        raise ConfigError(f"{unknown[0]}: {choice}")
    resume: Resume = "auto" if "--resume=auto" in resuming else "yes" if resuming else "no"
    return Arguments(command, given.files, given.overrides, resume, check="--check" in given.options)


def run(words: Sequence[str]) -> int:
    arguments = parse(words)
    config = load_config(arguments.files, arguments.overrides)
    if arguments.check:
        lines = check_run(config, arguments.command)
        sys.stdout.write("\n".join([f"ok: {_checked(config, arguments.command)}", *lines]) + "\n")
        return 0
    world_size = config.parallel.world_size
    place = find_rank(world_size)
    if place is not None:
        return _run_rank(arguments, config, place)
    _check(arguments, config, rank=0)
    check_lines(config, arguments.command)  # the ranks find the same when they load them
    make_folders(config, arguments.command)
    return launch_local([sys.executable, "-m", "megatron_rpp.cli", *words], world_size, config.run.dir)


def _check(arguments: Arguments, config: Config, rank: int) -> None:
    """All that can be told before anything is built. Raises ValueError."""
    _check_model(config, arguments.command)
    if arguments.command == "train" and rank == 0:  # the server and the metrics are rank 0's
        check_host(config, resume=arguments.resume != "no")


def _check_model(config: Config, command: Literal["train", "sft"]) -> None:
    validate(config, command)
    from megatron_rpp.model.checks import check_model  # imports torch

    check_model(config, command)


def check_run(config: Config, command: Literal["train", "sft"]) -> list[str]:
    """All that needs neither ranks nor this host: configuration, model and data. Raises ValueError.

    Returns a line on the prompts of each source.
    """
    _check_model(config, command)
    check_lines(config, command)
    return check_prompts(config, command)


def _checked(config: Config, command: str) -> str:
    """What `check_run` has looked at, in words."""
    if command == "sft":
        return f"configuration, model {config.sft.init}, demonstrations {config.sft.data}"
    named = {**training_sources(config.data), **held_out_sources(config)}
    sets = ", ".join(source.path or source.task for source in named.values())
    return f"configuration, model {config.model.path} ({in_short(config.parallel)}), data {sets}; nothing was started"


def check_lines(config: Config, command: str) -> None:
    """Every line of JSONL sources, the columns of tables, the first problem of others. Raises ValueError with the
    line's number."""
    if command == "sft":
        from megatron_rpp.data.jsonl import check_jsonl

        check_jsonl(config.sft.data, [*template_names(config.data.prompt_template), ("response", "answer")])
        return
    from megatron_rpp.data.preflight import check_problems

    data, is_ordered = config.data, config.data.curriculum == "easy_first"
    for source in training_sources(data).values():
        check_problems(source, data, needs_answer=is_verified(config, source), needs_pass_rate=is_ordered)
    for source in held_out_sources(config).values():
        check_problems(source, data, needs_answer=is_verified(config, source), needs_pass_rate=False)


def _run_rank(arguments: Arguments, config: Config, place: JobPlace) -> int:
    """One rank of the job: the user's mistake becomes one line from rank 0, ours a traceback."""
    from megatron_rpp.observability.logs import setup_logging
    from megatron_rpp.parallel.rank_process import left_out_of_collections, take_signals

    take_signals(place.launcher, os.environ, saves=arguments.command == "train")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else C++ stacks of lost connections stand before the cause
    try:
        with left_out_of_collections():
            _check_world_size(config, place)
            _check(arguments, config, place.rank)
            make_folders(config, arguments.command)
            setup_logging(config.run.dir, place.rank)
            loop = _loop(arguments, config)
        code = loop()
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return _failed(config.run.dir, place, error)
    # All is closed and every rank is here. Python's own end could take long on a busy machine, and srun and mpirun
    # end the ranks that are not as quick when the first one ends with another code than 0 (STOPPED).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _failed(run_dir: str, place: JobPlace, error: Exception) -> int:
    """Log and report what ended this rank, tell the user, and return the exit code."""
    import traceback

    from megatron_rpp.observability.logs import append_log, log_path, stderr_is_log
    from megatron_rpp.parallel.failures import report
    from megatron_rpp.parallel.own_failure import failure_of, is_users_mistake

    rank, trace = place.rank, "".join(traceback.format_exception(error))
    append_log(run_dir, rank, trace + (error_line(error) if is_users_mistake(error) else ""))
    failure = failure_of(error, rank, place.host)
    report(run_dir, place.attempt, failure, rank=rank, host=place.host)
    if is_users_mistake(error):
        return user_error(error)
    if _CLEAR_ERRORS & {kind.__name__ for kind in type(error).__mro__}:  # says by itself what happened
        if rank == 0:
            sys.stderr.write(f"{ERROR_PREFIX}{error}\nrpp: the traceback is in {log_path(run_dir, rank)}\n")
    elif not stderr_is_log(run_dir, rank):
        sys.stderr.write(trace)
    return failure.exit_code


def _check_world_size(config: Config, place: JobPlace) -> None:
    if place.world_size != config.parallel.world_size:
        ranks = f"the number of ranks in the job, {place.world_size}"
        raise ConfigError(f"{by_keys(config.parallel)} must equal {ranks}")
    if place.local_world_size != place.world_size and config.rollout.spawns_servers:
        raise ConfigError(
            "rollout.urls is not set, and the servers that rank 0 would spawn are out of reach for the job's other "
            "hosts; start SGLang servers and pass their addresses in rollout.urls, or start them with `rpp serve` and "
            "set rollout.registry=true"
        )
    if place.local_world_size != place.world_size and spawns_reward_model(config):
        raise ConfigError(
            "reward.model_urls is not set, and the reward model's server that rank 0 would start is out of reach for "
            "the job's other hosts; start sglang.launch_server --is-embedding with reward.model_path on a host that "
            "all reach, and pass its address in reward.model_urls"
        )


def _loop(arguments: Arguments, config: Config) -> Callable[[], int]:
    """What gives the exit code: 0, or STOPPED. All that it needs is imported."""
    if arguments.command == "train":
        from megatron_rpp.train import run as train

        return partial(train, config, resume=arguments.resume)
    from megatron_rpp.sft import run as sft

    return partial(sft, config)


def _usage(command: str) -> str:
    own = " [--resume[=auto]]" if command == "train" else ""
    lines = [f"rpp {command} CONFIG.toml ... [--section.key=value ...]{own} [--check]", ""]
    lines += ["  --check         look at configuration, model and data, tokenize the first prompts, and start nothing"]
    if own:
        lines += ["  --resume        from the newest complete checkpoint of run.dir"]
        lines += ["  --resume=auto   the same, or from the start where run.dir holds no run"]
    lines += [""]
    for key, kind, default, doc in describe():
        lines += [f"  --{key}=<{kind}>   default: {default!r}", f"      {doc}"]
    return "\n".join(lines) + "\n"
