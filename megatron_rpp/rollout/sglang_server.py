"""One SGLang server process on this host: spawn, wait, stop. It does not outlive its parent.

The kernel kills the server when the *thread* that called `start()` ends, so call it from a thread
that lives as long as the server is wanted (the main thread).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import psutil

from megatron_rpp.config.preflight import claim_port
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.parallel import die_with_parent
from megatron_rpp.parallel.stop_request import held_for_child
from megatron_rpp.rollout.addresses import base_url
from megatron_rpp.rollout.probe import examine
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.rollout.server_command import HOST, server_command, server_environment

_START_ATTEMPTS = 3
# Ends of a starting server that another attempt may avoid: its port was taken in between, or the machine
# is so busy that the server's own call to itself after its warm-up timed out.
_TRANSIENT = ("address already in use", "_freeze_gc_after_server_warmup")
_TAIL_LINES = 30
_PROBE_S = 5.0
_POLL_S = 0.2


class SGLangServer:
    """`start()`, then `wait_ready(deadline_s)`; `stop()` when done. Usable again after `stop()`."""

    def __init__(
        self,
        model_path: str,
        rollout: RolloutConfig,
        *,
        dtype: str,
        bf16_layers: Collection[int] = (),  # of float8 servers
        log_path: Path,
        host: str = HOST,  # the address of this host that it listens on
        device: str = "cpu",
        trust_remote_code: bool = False,
        base_gpu: int = 0,  # its ranks take this GPU and the next ones
        weight_loader: str | None = None,  # import path of a function for `load_format` of a weight update
        port: int | None = None,  # None: rollout.port; 0: a free one
        model_package: str | None = None,  # modules of model classes that go before SGLang's own
        command: Callable[[int], list[str]] | None = None,  # of a port; for a server that does not sample
    ) -> None:
        self._rollout, self._device, self._log_path, self._host = rollout, device, log_path, host
        self._wanted_port, self._model_package = rollout.port if port is None else port, model_package
        self._command = command or (
            lambda p: server_command(
                model_path,
                rollout,
                dtype,
                device,
                p,
                host=host,
                trust_remote_code=trust_remote_code,
                base_gpu=base_gpu,
                weight_loader=weight_loader,
                bf16_layers=bf16_layers,
            )
        )
        self._port = self._wanted_port
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0  # of the present process, in bytes: the log keeps earlier ones
        self._starts = 0  # since the last `start()`
        self._started_at = 0.0  # monotonic seconds of the last `start()`

    @property
    def url(self) -> str:
        """Base URL; known after `start()`, and changed by a restart if the port was 0."""
        return base_url(self._host, self._port)

    @property
    def pid(self) -> int | None:
        """Process id, which is also its process group's; None when not started."""
        return self._process.pid if self._process else None

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def ending(self) -> str | None:
        """How the process ended by itself; None where it runs, or was not started."""
        if self._process is None or self._process.poll() is None:
            return None
        return f"its process has ended ({_describe_exit(self._process.returncode)}); its log is {self._log_path}"

    def check(self) -> None:
        """Raises ConfigError for settings that it cannot be started with."""
        self._command(0)

    def start(self) -> None:
        """Spawn; returns at once. Raises ConfigError if the requested port is in use."""
        assert self._process is None, "start() on a server that was not stopped"
        self._starts, self._started_at = 0, time.monotonic()
        self._spawn()

    def wait_ready(self, deadline_s: float) -> None:
        """Wait until it answers. Raises RolloutError with the end of its log if it dies or takes too long."""
        while not self.is_alive() or isinstance(examine(self.url, _PROBE_S), str):
            self.check_start(deadline_s)
            time.sleep(_POLL_S)

    def check_start(self, deadline_s: float) -> None:
        """For a server that does not answer yet; spawns it again where it died for a reason that may pass.

        Raises RolloutError with the end of its log where it has died or is later than `deadline_s`; it is stopped then.
        """
        if not self.is_alive():
            self._retry_or_raise()
        elif time.monotonic() - self._started_at > deadline_s:
            self.stop()
            raise RolloutError(
                f"SGLang server {self.url} was not ready after rollout.startup_deadline_s="
                f"{deadline_s:g} s; the end of its log {self._log_path}:\n{self.log_tail()}"
            )

    def stop(self) -> None:
        """Kill the process and all of its group; returns when they are gone. Safe to call twice.

        No gentler signal first: SGLang's own shutdown takes 6 s and leaves no less behind.
        """
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _wait_for_group(process.pid)

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """The last lines that the present process wrote."""
        with contextlib.suppress(FileNotFoundError), self._log_path.open("rb") as log:
            log.seek(self._log_start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
        return ""

    def _spawn(self) -> None:
        """On a free port, as the leader of a new process group, with its output in the log."""
        self._starts += 1
        self._port = claim_port(self._wanted_port, self._host)
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("ab") as log, held_for_child():
            self._log_start = log.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-S",
                    die_with_parent.__file__,
                    str(os.getpid()),
                    *self._command(self._port),
                ],
                env=server_environment(os.environ, self._rollout, self._device, self._host, self._model_package),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its own process group, and no Ctrl-C from the terminal
            )

    def _retry_or_raise(self) -> None:
        """It died while starting: again if the reason may pass."""
        process, tail = self._process, self.log_tail()
        is_transient = any(reason in self.log_tail(lines=200).lower() for reason in _TRANSIENT)
        assert process is not None, "wait_ready() before start()"
        self.stop()
        if is_transient and self._starts < _START_ATTEMPTS:
            self._spawn()
            return
        raise RolloutError(
            f"SGLang server {self.url} died while starting ({_describe_exit(process.returncode)}); "
            f"the end of its log {self._log_path}:\n{tail}"
        )


def _wait_for_group(group: int, timeout_s: float = 10.0) -> None:
    """Until no process of the group runs; a zombie that its new parent has not reaped counts as gone."""
    end = time.monotonic() + timeout_s
    while _is_group_running(group) and time.monotonic() < end:
        time.sleep(0.02)


def _is_group_running(group: int) -> bool:
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    hint = "; out of memory?" if code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"
