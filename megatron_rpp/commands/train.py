"""`rpp train` and `rpp sft`: starts the ranks on this host, or is one of a launcher's ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from megatron_rpp.commands.messages import error_line, user_error
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.load import describe, load_config
from megatron_rpp.config.preflight import check_host, make_folders
from megatron_rpp.config.schema import Config
from megatron_rpp.config.validate import template_names, validate
from megatron_rpp.parallel.local_launch import ERROR_PREFIX, launch_local

INTERRUPTED = 130
_SERVER_ERRORS = {"RolloutError", "WeightSyncError", "ParityError"}  # by name: their modules import torch


@dataclass(frozen=True)
class Arguments:
    """A `train` or `sft` command line."""

    command: Literal["train", "sft"]
    files: tuple[str, ...]
    overrides: tuple[str, ...]
    resume: bool


def parse(words: Sequence[str]) -> Arguments:
    """`train` or `sft`, its files, its overrides and --resume. Raises ConfigError."""
    command, rest = cast(Literal["train", "sft"], words[0]), list(words[1:])
    overrides = tuple(word for word in rest if word.startswith("-") and word != "--resume")
    files = tuple(word for word in rest if not word.startswith("-"))
    if not files:
        raise ConfigError(f"no configuration file; write: rpp {command} CONFIG.toml")
    if command == "sft" and "--resume" in rest:
        raise ConfigError("--resume is for `rpp train`; `rpp sft` starts over")
    return Arguments(command, files, overrides, "--resume" in rest)


def run(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        sys.stdout.write(_settings(words[0]))
        return 0
    arguments = parse(words)
    config = load_config(arguments.files, arguments.overrides)
    if "WORLD_SIZE" in os.environ:
        return _run_rank(arguments, config, os.environ)
    _check(arguments, config, rank=0)
    _check_lines(config, arguments.command)  # the ranks find the same when they load them
    make_folders(config, arguments.command)
    parallel = config.parallel
    world_size = parallel.tensor * parallel.pipeline * parallel.data
    return launch_local([sys.executable, "-m", "megatron_rpp.cli", *words], world_size, config.run.dir)


def _check(arguments: Arguments, config: Config, rank: int) -> None:
    """All that can be told before anything is built. Raises ValueError."""
    validate(config, arguments.command)
    from megatron_rpp.model.checks import check_model  # imports torch

    check_model(config, arguments.command)
    if arguments.command == "train" and rank == 0:  # the server and the metrics are rank 0's
        check_host(config, resume=arguments.resume)


def _check_lines(config: Config, command: str) -> None:
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


def _run_rank(arguments: Arguments, config: Config, env: Mapping[str, str]) -> int:
    """One rank of the job: the user's mistake becomes one line from rank 0, ours a traceback."""
    import traceback

    from megatron_rpp.observability.logs import append_log, log_path, setup_logging, stderr_is_log
    from megatron_rpp.parallel.rank_process import exit_on_sigterm

    rank = int(env.get("RANK", "0"))
    exit_on_sigterm()
    try:
        _check_world_size(config, env)
        _check(arguments, config, rank)
        make_folders(config, arguments.command)
        setup_logging(config.run.dir, rank)
        _call(arguments, config)
    except ValueError as error:
        append_log(config.run.dir, rank, traceback.format_exc() + error_line(error))
        return user_error(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        append_log(config.run.dir, rank, traceback.format_exc())
        if _SERVER_ERRORS & {kind.__name__ for kind in type(error).__mro__}:  # says by itself what happened
            if rank == 0:
                sys.stderr.write(f"{ERROR_PREFIX}{error}\nrpp: the traceback is in {log_path(config.run.dir, rank)}\n")
            return 1
        if not stderr_is_log(config.run.dir, rank):
            sys.stderr.write(traceback.format_exc())
        return 1
    return 0


def _check_world_size(config: Config, env: Mapping[str, str]) -> None:
    world_size = int(env["WORLD_SIZE"])
    tensor, pipeline, data = config.parallel.tensor, config.parallel.pipeline, config.parallel.data
    if world_size != tensor * pipeline * data:
        raise ConfigError(
            f"parallel.tensor={tensor} x parallel.pipeline={pipeline} x parallel.data={data} must equal "
            f"the number of ranks in the job, {world_size}"
        )
    if int(env.get("LOCAL_WORLD_SIZE", world_size)) != world_size and config.rollout.spawns_servers:
        raise ConfigError(
            "rollout.urls is not set, and the servers that rank 0 would spawn are out of reach for the job's other "
            "hosts; start SGLang servers and pass their addresses in rollout.urls"
        )


def _call(arguments: Arguments, config: Config) -> None:
    if arguments.command == "train":
        from megatron_rpp.train import run as train

        train(config, resume=arguments.resume)
    else:
        from megatron_rpp.sft import run as sft

        sft(config)


def _settings(command: str) -> str:
    lines = [f"rpp {command} CONFIG.toml ... [--section.key=value ...]", ""]
    for key, kind, default, doc in describe():
        lines += [f"  --{key}=<{kind}>   default: {default!r}", f"      {doc}"]
    return "\n".join(lines) + "\n"
