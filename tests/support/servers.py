"""Real SGLang servers that live as long as a fixture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.rollout.sglang_server import SGLangServer


@contextmanager
def running(server: SGLangServer) -> Iterator[SGLangServer]:
    """Start `server` and wait until it answers; stop it at the end, however that comes."""
    server.start()
    try:
        server.wait_ready(RolloutConfig().startup_deadline_s)
        yield server
    finally:
        server.stop()
