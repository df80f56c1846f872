"""What only the launching host can tell: is the port free, is the run directory free, does the environment fit."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from megatron_rpp.config.allocator import check_allocator
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.schema import Config


def make_folders(config: Config, command: str) -> None:
    """The folders that the command writes to exist and can be written. Raises ConfigError."""
    keys = {"run.dir": Path(config.run.dir)}
    if command == "sft":
        keys["sft.output"] = Path(config.sft.output).parent
    for key, folder in keys.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{key}: cannot make the directory {folder}: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"{key}: the directory {folder} cannot be written; choose another")


def check_host(config: Config, *, resume: bool) -> None:
    """For the launcher or rank 0, before anything is spawned or written. Raises ConfigError."""
    check_allocator(config, os.environ)
    check_port(config)
    check_run_dir(config.run.dir, resume=resume)


def check_port(config: Config) -> None:
    """The ports of the servers that the trainer would spawn are free."""
    rollout = config.rollout
    if not rollout.spawns_servers or rollout.port == 0:
        return
    for index in range(rollout.num_servers):
        claim_port(rollout.port + index)


def claim_port(wanted: int, host: str = "127.0.0.1") -> int:
    """`wanted` if it is free on `host`, or a free port that the system chooses for 0. Raises ConfigError.

    host: an address of this host.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Lets a port in TIME_WAIT, left by a server that has just ended, pass; a listening one still fails.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted))
        except PermissionError as error:
            raise ConfigError(f"rollout.port={wanted} needs privileges; choose one above 1023") from error
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"{host} must be an address of this host: {error}") from error
            message = f"rollout.port={wanted} is in use on {host}; choose another, or 0 for a free one"
            raise ConfigError(message) from error
        return int(probe.getsockname()[1])


def check_run_dir(run_dir: str, *, resume: bool) -> None:
    """A run is never overwritten: its metrics are continued with --resume, or the new run goes elsewhere."""
    path = Path(run_dir)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run.dir={run_dir} must be a directory; a file is there")
    metrics = path / "metrics.jsonl"
    if not resume and metrics.exists() and metrics.stat().st_size:
        raise ConfigError(f"run.dir={run_dir} already holds a run; pass --resume to continue it, or another --run.dir")
