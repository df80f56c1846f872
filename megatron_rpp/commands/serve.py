"""`rpp serve`: one SGLang server that announces itself to the job in run.dir, on any host that reaches it."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rpp.commands.words import split
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.load import load_config
from megatron_rpp.config.preflight import claim_port, make_folders
from megatron_rpp.config.schema import Config
from megatron_rpp.config.validate import validate
from megatron_rpp.observability.logs import LOGGER
from megatron_rpp.parallel.environment import node_name
from megatron_rpp.parallel.exit_codes import ERROR_PREFIX
from megatron_rpp.parallel.interfaces import resolve

_USAGE = """\
rpp serve CONFIG.toml ... [--section.key=value ...] [--host ADDRESS]

Starts one SGLang server on this host for the job in run.dir, which must run with rollout.registry=true, and
restarts it when it dies. Ends with the job, or on SIGTERM. Under srun each task starts one.

  --host ADDRESS   of this host, that the server listens on; default: the one on the route to the job's rank 0
"""


@dataclass(frozen=True)
class Arguments:
    """A `serve` command line."""

    files: tuple[str, ...]
    overrides: tuple[str, ...]
    host: str | None  # an address of this host


@dataclass(frozen=True)
class Seat:
    """Which of this host's servers this one is."""

    host: str
    index: int  # among the tasks of srun on this host, or 0
    log_name: str
    base_gpu: int


def run(words: Sequence[str]) -> int:
    """Serve until the job is over (exit code 0), or the server cannot be started (1)."""
    arguments = parse(words)
    config = load_config(arguments.files, [*arguments.overrides, "--rollout.registry=true"])
    seat = find_seat(config, os.environ)
    check(config, arguments, seat)
    return _serve(config, arguments, seat)


def parse(words: Sequence[str]) -> Arguments:
    """Files, overrides and --host. Raises ConfigError, HelpAsked."""
    given = split(words[1:], _USAGE, options=("--host",))
    host = given.options.get("--host")
    return Arguments(given.files, given.overrides, None if host is None else _address(host))


def find_seat(config: Config, env: Mapping[str, str]) -> Seat:
    """This process's place among those of its host. Two without srun log by their process ids."""
    host, is_task = node_name(env), "SLURM_LOCALID" in env
    index = int(env["SLURM_LOCALID"]) if is_task else 0
    name = f"sglang-{host}-{index if is_task else os.getpid()}.txt"
    return Seat(host, index, name, _base_gpu(index, config.rollout.server_tensor, env.get("CUDA_VISIBLE_DEVICES")))


def check(config: Config, arguments: Arguments, seat: Seat) -> None:
    """All that can be told before anything is started. Raises ValueError."""
    validate(config, "train")
    # torch, from here on, would tell of every lost connection in its own words, with C++ stacks.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from megatron_rpp.model.checks import check_model
    from megatron_rpp.rollout.run_server import run_server

    check_model(config, "train")
    make_folders(config, "train")
    claim_port(config.rollout.port and config.rollout.port + seat.index, arguments.host or "0.0.0.0")
    run_server(config, seat.index, seat.log_name, base_gpu=seat.base_gpu).check()


def _serve(config: Config, arguments: Arguments, seat: Seat) -> int:
    from megatron_rpp.parallel.rank_process import exit_on_sigterm
    from megatron_rpp.rollout.announced_server import AnnouncedServer
    from megatron_rpp.rollout.job_store import JobOver, JobStore
    from megatron_rpp.rollout.protocol import RolloutError
    from megatron_rpp.rollout.run_server import run_server
    from megatron_rpp.rollout.sglang_server import SGLangServer

    _set_up_logging(seat)
    exit_on_sigterm()
    signal.signal(signal.SIGUSR1, lambda *_: None)  # it tells the trainer to save, and by default would end us

    def make(address: str) -> SGLangServer:
        return run_server(config, seat.index, seat.log_name, base_gpu=seat.base_gpu, host=address)

    jobs = JobStore(config.run.dir, os.environ.get("RPP_ATTEMPT") or None, config.rollout.startup_deadline_s)
    try:
        AnnouncedServer(make, jobs, config, seat.host, arguments.host).run()
    except JobOver as over:
        sys.stderr.write(f"rpp serve: {over}\n")
    except RolloutError as error:
        sys.stderr.write(f"{ERROR_PREFIX}{error}\n")
        return 1
    except (SystemExit, KeyboardInterrupt):
        sys.stderr.write("rpp serve: asked to leave; the server is gone\n")
    return 0


def _address(host: str) -> str:
    """Of a name or an address. Raises ConfigError for one that is none, or stands for all."""
    advice = "pass --host=ADDRESS with one address of this host, that the job's rank 0 reaches"
    address = resolve(host, node_name(), advice) if host else ""
    if not address or ipaddress.ip_address(address).is_unspecified:
        raise ConfigError(f"--host={host} is no address to announce; {advice}")
    return address


def _base_gpu(index: int, num_gpus: int, visible: str | None) -> int:
    """The first GPU of this server. visible: CUDA_VISIBLE_DEVICES; srun may show each task its own alone."""
    first = index * num_gpus
    return 0 if visible is not None and first + num_gpus > len(visible.split(",")) else first


def _set_up_logging(seat: Seat) -> None:
    logger = logging.getLogger(LOGGER)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s rpp serve {seat.host}/{seat.index} %(levelname)s: %(message)s")
    )
    logger.addHandler(handler)
