"""The SGLang server of a reward model, beside the trainer: started, watched, and started again where it ends."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_rpp import device
from megatron_rpp.config.preflight import claim_port
from megatron_rpp.config.schema import Config
from megatron_rpp.rollout.backoff import Backoff
from megatron_rpp.rollout.probe import examine
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.rollout.server_command import CPU_FLAGS, HOST
from megatron_rpp.rollout.sglang_server import SGLangServer

logger = logging.getLogger(__name__)

LOG_NAME = "reward-model.txt"
MODEL_PACKAGE = "megatron_rpp.rollout.in_server.reward_models"
_POLL_S = 0.5
_PROBE_S = 10.0  # pause between two probes, and longest wait for the answer to one


class RewardModelServer:
    """`start()`, then `wait_ready()`; `stop()` when done. Its URL stays the same when it is started again."""

    def __init__(self, server: SGLangServer, startup_deadline_s: float, health_deadline_s: float, backoff_s: float):
        """server: with a port of its own, not started; it belongs to a thread in here from `start()` on."""
        self.url = server.url
        self._server, self._backoff = server, Backoff(backoff_s)
        self._startup_deadline_s, self._health_deadline_s = startup_deadline_s, health_deadline_s
        self._end, self._is_settled = threading.Event(), threading.Event()
        self._failure: str | None = "it was stopped"  # of the first start
        # The kernel ends a server with the thread that started it (sglang_server.py).
        self._thread = threading.Thread(target=self._keep, name="reward-model", daemon=True)

    def start(self) -> None:
        """Returns at once."""
        self._thread.start()

    def wait_ready(self) -> None:
        """Until the first start has come to an end. Raises RolloutError where it failed, with the end of the log."""
        self._is_settled.wait()
        if self._failure is not None:
            raise RolloutError(f"the reward model's server: {self._failure}")

    def stop(self) -> None:
        """Safe to call twice."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _keep(self) -> None:
        try:
            while not self._end.is_set():
                trouble = self._run()
                self._server.stop()
                if self._failure is not None:  # what has never worked will not by itself
                    self._failure = trouble
                    return
                if not self._end.is_set():
                    wait_s = self._backoff.failed()
                    logger.warning("the reward model's server is down, to start again in %g s: %s", wait_s, trouble)
                    self._end.wait(wait_s)
        finally:
            self._is_settled.set()
            self._server.stop()

    def _run(self) -> str:
        """One start, and the time after it. Why the server does not serve any more."""
        try:
            self._server.start()
            while isinstance(examine(self._server.url, _PROBE_S), str):
                if self._end.wait(_POLL_S):
                    return "it was stopped"
                self._server.check_start(self._startup_deadline_s)
        except (RolloutError, ValueError, OSError) as error:
            return str(error)
        self._failure = None
        self._is_settled.set()
        self._backoff.reset()
        logger.info("the reward model's server at %s is ready", self._server.url)
        return self._watch()

    def _watch(self) -> str:
        """Until it ends or is silent for too long; why."""
        last_sign = next_probe = time.monotonic()
        while not self._end.wait(_POLL_S):
            if (ending := self._server.ending) is not None:
                return ending
            if time.monotonic() < next_probe:
                continue
            seen = examine(self._server.url, _PROBE_S)
            next_probe = time.monotonic() + _PROBE_S
            if not isinstance(seen, str):
                last_sign = time.monotonic()
            elif time.monotonic() - last_sign > self._health_deadline_s:
                return f"no sign of life for rollout.health_deadline_s={self._health_deadline_s:g} s: {seen}"
        return "it was stopped"


def build_reward_model_server(config: Config) -> RewardModelServer:
    """The server of reward.model_path on a free port of loopback, behind the spawned servers' GPUs; not started."""
    rollout = config.rollout
    server = SGLangServer(
        config.reward.model_path,
        replace(rollout, server_tensor=1),  # read for the threads that a CPU server's ranks get
        dtype="",
        log_path=Path(config.run.dir) / "logs" / LOG_NAME,
        device="cuda" if device.has_cuda() else "cpu",
        port=claim_port(0),
        command=reward_model_command(config, "cuda" if device.has_cuda() else "cpu"),
        model_package=MODEL_PACKAGE,
    )
    return RewardModelServer(server, rollout.startup_deadline_s, rollout.health_deadline_s, rollout.restart_backoff_s)


def reward_model_command(config: Config, device: str) -> Callable[[int], list[str]]:
    """The command as a function of the port; reward.model_server_args come last, so that they win."""
    rollout = config.rollout
    first_gpu = rollout.num_servers * rollout.server_tensor if rollout.spawns_servers else 0
    tokens = max(rollout.max_total_tokens, rollout.context_length)
    on_cpu = ["--dtype", "float32", *CPU_FLAGS, "--max-total-tokens", str(tokens)]

    def command(port: int) -> list[str]:
        return [
            *(sys.executable, "-m", "sglang.launch_server"),
            *("--model-path", config.reward.model_path),
            *("--host", HOST, "--port", str(port)),
            *("--device", device),
            "--is-embedding",  # SGLang's word for a model that does not generate
            "--skip-tokenizer-init",  # token ids go in
            *(on_cpu if device == "cpu" else ["--base-gpu-id", str(first_gpu)]),
            *config.reward.model_server_args,
        ]

    return command
