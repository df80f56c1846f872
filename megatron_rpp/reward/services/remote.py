"""Rewards from an HTTP service of the user's (docs/rewards.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.reward.services.service import Request, Service, finite

if TYPE_CHECKING:
    from megatron_rpp.experience.types import Rollout

_BATCH = 32  # responses in a request


class RemoteReward:
    """What the service at reward.url says of each response. Raises RewardError where it does not say."""

    def __init__(self, config: RewardConfig) -> None:
        self._service = Service((config.url,), config.request_deadline_s, config.max_retries)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        parts = [rollouts[start : start + _BATCH] for start in range(0, len(rollouts), _BATCH)]
        requests = [Request({"responses": [_description(r) for r in part]}, len(part)) for part in parts]
        return self._service.score(requests, _rewards)

    def metrics(self) -> Metrics:
        return Metrics()

    def close(self) -> None: ...


def _rewards(reply: Any, count: int) -> list[float]:
    if not isinstance(reply, dict) or "rewards" not in reply:
        raise ValueError('the reply must be {"rewards": [...]}')
    return finite(reply["rewards"], count)


def _description(rollout: Rollout) -> dict[str, Any]:
    """What the service is told of a response."""
    prompt = rollout.prompt
    return {
        "prompt": prompt.text,
        "response": rollout.text,
        "answer": prompt.answer,
        "source": prompt.source,
        "truncated": rollout.is_truncated,
        "metadata": _as_json(prompt.metadata),
    }


def _as_json(value: Any) -> Any:
    """`value` with text for keys, and null for NaN and infinities: JSON has no word for them, and parsers refuse."""
    if isinstance(value, dict):
        return {str(key): _as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
