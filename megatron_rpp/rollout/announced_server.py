"""One SGLang server that announces itself to the job, wherever that is, for as long as there is one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from megatron_rpp.config.schema import Config
from megatron_rpp.rollout.http import get_json
from megatron_rpp.rollout.job_store import JobStore
from megatron_rpp.rollout.members import SpawnedMember
from megatron_rpp.rollout.protocol import RolloutError
from megatron_rpp.rollout.registry import Announcement, Registry
from megatron_rpp.rollout.sglang_server import SGLangServer

logger = logging.getLogger(__name__)

_POLL_S = 0.25
_LONGEST_BEAT_S = 2.0
_LONGEST_ANSWER_S = 5.0
_PROVEN_S = 60.0  # who has served for so long is started again without a long wait


class AnnouncedServer:
    """`run` in the main thread (see sglang_server.py); it starts the server again when that dies or falls silent."""

    def __init__(
        self, make: Callable[[str], SGLangServer], jobs: JobStore, config: Config, host_name: str, address: str | None
    ) -> None:
        """make: a server that listens on an address. address: the one to use; None: on the route to the job."""
        self._make, self._jobs, self._rollout, self._host_name = make, jobs, config.rollout, host_name
        self._wanted_address = address
        self._address = ""  # that the server listens on
        self._member: SpawnedMember | None = None
        self._registry: Registry | None = None
        self._announcement: Announcement | None = None
        self._announced_url = ""
        self._beat_s = min(_LONGEST_BEAT_S, config.rollout.health_deadline_s / 10)
        self._next_beat = 0.0  # monotonic seconds, as the following
        self._serving_since = self._last_sign = 0.0
        # While a sync sends weights, a server may answer nothing until the deadline of that phase.
        self._longest_silence_s = config.rollout.health_deadline_s + 2 * config.weight_sync.deadline_s
        self._failures = 0  # to start, in a row

    def run(self) -> None:
        """Until JobOver, or RolloutError where the server fails to start rollout.max_retries + 1 times in a row.

        However it ends, the server withdraws and is gone.
        """
        try:
            while True:
                is_beat = time.monotonic() >= self._next_beat
                if is_beat:
                    self._next_beat = time.monotonic() + self._beat_s
                    self._follow_job()
                self._tend(is_beat)
                self._tell(is_beat)
                time.sleep(min(_POLL_S, self._beat_s))
        finally:
            self._leave()

    def _follow_job(self) -> None:
        """Announce to the job that runs now; the first one decides where the server listens."""
        before, store = self._jobs.store, self._jobs.look()
        if store is not None and store is before and self._registry is not None:
            return
        self._registry, self._announcement = None, None
        if store is None or self._jobs.rendezvous is None:
            return
        self._registry = Registry(store, self._jobs.rendezvous.attempt, self._rollout.health_deadline_s)
        address = self._wanted_address or self._jobs.own_address
        if address != self._address:
            self._start(address)

    def _start(self, address: str) -> None:
        if self._member is not None:
            logger.info("the job is reached by %s now, not by %s", address, self._address)
            self._member.stop()
        self._address, self._member = address, SpawnedMember(self._make(address), self._rollout)
        self._member.start()

    def _tend(self, is_beat: bool) -> None:
        """Notice that the server is ready, has died or is silent, and have it start again."""
        member = self._member
        if member is None:
            return
        if member.info is not None and member.is_alive:
            if is_beat:
                self._check_silence(member)
            return
        was_serving = member.info is not None
        try:
            member.settle(member.look(is_suspect=False))
        except RolloutError as error:
            self._failures += 1
            if self._failures > self._rollout.max_retries:
                raise
            logger.warning("%s", error)
        if member.info is not None and not was_serving:
            self._failures, self._serving_since = 0, time.monotonic()
            self._last_sign = self._serving_since

    def _check_silence(self, member: SpawnedMember) -> None:
        """By /server_info: /health would disturb sampling, and is not answered in a sync."""
        now, answer_s = time.monotonic(), min(_LONGEST_ANSWER_S, self._rollout.health_deadline_s / 3)
        try:
            get_json(member.url, "server_info", answer_s)
        except RolloutError as error:
            if now - self._last_sign > self._longest_silence_s:
                member.drop(f"no sign of life for {self._longest_silence_s:g} s: {error}")
            return
        self._last_sign = time.monotonic()
        if now - self._serving_since > _PROVEN_S:
            member.forget_failures()

    def _tell(self, is_beat: bool) -> None:
        """Announce, renew or withdraw, as the server is."""
        url = self._member.url if self._member is not None and self._member.info is not None else None
        try:
            if self._announcement is not None and url != self._announced_url:
                self._announcement.withdraw()
                self._announcement = None
            if self._announcement is None and url is not None and self._registry is not None:
                self._announcement, self._announced_url = self._registry.announce(url, self._host_name), url
                logger.info("announced %s", url)
            elif self._announcement is not None and is_beat:
                self._announcement.renew()
        except dist.DistError as error:
            self._jobs.lost(str(error).splitlines()[0])
            self._registry, self._announcement = None, None

    def _leave(self) -> None:
        if self._announcement is not None:
            with suppress(dist.DistError):  # the job may be gone
                self._announcement.withdraw()
        if self._member is not None:
            self._member.stop()
