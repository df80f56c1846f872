"""`rpp train` and `rpp sft`: starts the ranks on this host, or is one of a launcher's ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from megatron_rpp.commands.messages import error_line, user_error
from megatron_rpp.commands.words import split
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.job import Resume
from megatron_rpp.config.load import describe, load_config
from megatron_rpp.config.preflight import check_host, make_folders
from megatron_rpp.config.schema import Config
from megatron_rpp.config.validate import template_names, validate
from megatron_rpp.parallel.environment import JobPlace, find_rank
from megatron_rpp.parallel.exit_codes import ERROR_PREFIX, INTERRUPTED
from megatron_rpp.parallel.local_launch import launch_local

_CLEAR_ERRORS = {"RolloutError", "WeightSyncError", "ParityError", "TakenOver"}  # by name: most modules import torch


@dataclass(frozen=True)
class Arguments:
    """A `train` or `sft` command line."""

    command: Literal["train", "sft"]
    files: tuple[str, ...]
    overrides: tuple[str, ...]
    resume: Resume


def parse(words: Sequence[str]) -> Arguments:
    """`train` or `sft`, its files, its overrides and --resume or --resume=auto. Raises ConfigError, HelpAsked."""
    command = cast(Literal["train", "sft"], words[0])
    given = split(words[1:], _usage(command), flags=("--resume", "--resume=auto"))
    unknown = [word for word in given.overrides if word.startswith("--resume=")]
    if command == "sft" and (given.options or unknown):
        raise ConfigError("--resume is for `rpp train`; `rpp sft` starts over")
    if unknown:
        choice = "write --resume to continue a run, or --resume=auto to start it where there is none"
        raise ConfigError(f"{unknown[0]}: {choice}")
    resume: Resume = "auto" if "--resume=auto" in given.options else "yes" if given.options else "no"
    return Arguments(command, given.files, given.overrides, resume)


def run(words: Sequence[str]) -> int:
    arguments = parse(words)
    config = load_config(arguments.files, arguments.overrides)
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
    validate(config, arguments.command)
    from megatron_rpp.model.checks import check_model  # imports torch

    check_model(config, arguments.command)
    if arguments.command == "train" and rank == 0:  # the server and the metrics are rank 0's
        check_host(config, resume=arguments.resume != "no")


def check_lines(config: Config, command: str) -> None:
    """Every line of every JSONL source. Raises ValueError with the number of the line."""
    from megatron_rpp.data.jsonl import check_jsonl

    keys = template_names(config.data.prompt_template)
    if command == "sft":
        check_jsonl(config.sft.data, [*keys, ("response", "answer")])
        return
    evaluates = config.data.eval.is_set and config.eval.interval
    for source in (config.data.train, config.data.eval) if evaluates else (config.data.train,):
        if source.kind == "jsonl":
            check_jsonl(source.path, [*keys, "answer"], limit=source.size)


def _run_rank(arguments: Arguments, config: Config, place: JobPlace) -> int:
    """One rank of the job: the user's mistake becomes one line from rank 0, ours a traceback."""
    from megatron_rpp.observability.logs import setup_logging
    from megatron_rpp.parallel.rank_process import take_signals

    take_signals(place.launcher, os.environ, saves=arguments.command == "train")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else C++ stacks of lost connections stand before the cause
    try:
        _check_world_size(config, place)
        _check(arguments, config, place.rank)
        make_folders(config, arguments.command)
        setup_logging(config.run.dir, place.rank)
        code = _call(arguments, config)
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
    tensor, pipeline, data = config.parallel.tensor, config.parallel.pipeline, config.parallel.data
    if place.world_size != config.parallel.world_size:
        raise ConfigError(
            f"parallel.tensor={tensor} x parallel.pipeline={pipeline} x parallel.data={data} must equal "
            f"the number of ranks in the job, {place.world_size}"
        )
    if place.local_world_size != place.world_size and config.rollout.spawns_servers:
        raise ConfigError(
            "rollout.urls is not set, and the servers that rank 0 would spawn are out of reach for the job's other "
            "hosts; start SGLang servers and pass their addresses in rollout.urls, or start them with `rpp serve` and "
            "set rollout.registry=true"
        )


def _call(arguments: Arguments, config: Config) -> int:
    """The exit code: 0, or STOPPED."""
    if arguments.command == "train":
        from megatron_rpp.train import run as train

        return train(config, resume=arguments.resume)
    from megatron_rpp.sft import run as sft

    sft(config)
    return 0


def _usage(command: str) -> str:
    own = " [--resume[=auto]]" if command == "train" else ""
    lines = [f"rpp {command} CONFIG.toml ... [--section.key=value ...]{own}", ""]
    if own:
        lines += ["  --resume        from the newest complete checkpoint of run.dir"]
        lines += ["  --resume=auto   the same, or from the start where run.dir holds no run", ""]
    for key, kind, default, doc in describe():
        lines += [f"  --{key}=<{kind}>   default: {default!r}", f"      {doc}"]
    return "\n".join(lines) + "\n"
