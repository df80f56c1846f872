"""What a transport does: carry the policy's weights into every server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_rpp.model.build import Model

Post = Callable[[str, str, dict[str, object], float], dict[str, object]]
"""post(url, endpoint, payload, timeout_s) -> the server's JSON reply; raises RolloutError."""


class WeightSyncError(RuntimeError):
    """A sync failed; says the rank, the server and the bucket. The servers may hold mixed weights."""


class Transport(Protocol):
    """A collective over the whole job; every rank calls it and every rank raises if any failed."""

    def send(self, policy: Model, urls: Sequence[str]) -> None: ...

    def close(self) -> None: ...
