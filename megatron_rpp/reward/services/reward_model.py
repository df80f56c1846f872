"""Rewards of a Bradley-Terry reward model on SGLang servers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import requests

from megatron_rpp.config.reward import RewardConfig
from megatron_rpp.observability.metrics import Metrics
from megatron_rpp.reward.services.conversation import ConversationTokenizer
from megatron_rpp.reward.services.service import Request, Service, finite

if TYPE_CHECKING:
    from megatron_rpp.experience.types import Rollout

logger = logging.getLogger(__name__)

_BATCH = 8  # conversations in a request
_INFO_S = 10.0


class RewardModel:
    """The model's score of the prompt as the user's turn and the response as the assistant's.

    A conversation that is longer than the servers take loses the end of its response; the metric
    reward/clipped_fraction says how many did.
    """

    def __init__(self, config: RewardConfig, urls: Sequence[str]) -> None:
        """urls: of SGLang servers with the model of reward.model_path. Raises ValueError for its tokenizer."""
        self._urls = tuple(url.rstrip("/") for url in urls)
        self._tokenizer = ConversationTokenizer(config.model_path)
        self._service = Service(
            tuple(f"{url}/classify" for url in self._urls),
            config.request_deadline_s,
            config.max_retries,
            is_restarted=not config.model_urls,
        )
        self._limit: int | None = None  # tokens that every server takes, once one was asked
        self._metrics = Metrics()

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        conversations = self._tokenizer.encode([(r.prompt.asked, r.text) for r in rollouts])
        self._clip(rollouts, conversations)
        parts = [conversations[start : start + _BATCH] for start in range(0, len(rollouts), _BATCH)]
        return self._service.score([Request({"input_ids": part}, len(part)) for part in parts], _scores)

    def metrics(self) -> Metrics:
        found, self._metrics = self._metrics, Metrics()
        return found

    def close(self) -> None: ...

    def _clip(self, rollouts: Sequence[Rollout], conversations: list[list[int]]) -> None:
        """Shorten what the servers would refuse."""
        self._limit = self._limit or longest_input(self._urls)
        clipped = [i for i, ids in enumerate(conversations) if self._limit and len(ids) > self._limit]
        for i in clipped:
            assert self._limit is not None
            conversations[i] = self._tokenizer.shortened(rollouts[i].prompt.asked, rollouts[i].text, self._limit)
        self._metrics.add_mean("reward/clipped_fraction", len(clipped), len(rollouts))


def longest_input(urls: Sequence[str]) -> int | None:
    """Tokens that each of these SGLang servers takes; None where none of them says."""
    said = [length for url in urls if (length := _longest_input(url)) is not None]
    return min(said, default=None)


def _longest_input(url: str) -> int | None:
    try:
        with requests.Session() as session:
            session.trust_env = False  # a proxy of the environment does not know the servers
            info = session.get(f"{url}/server_info", timeout=_INFO_S).json()
        return int(info["max_req_input_len"]) - 1  # SGLang refuses this length itself
    except (requests.RequestException, ValueError, KeyError, TypeError) as error:
        logger.warning("%s/server_info does not say how long an input may be: %r", url, error)
        return None


def _scores(reply: Any, count: int) -> list[float]:
    """Of [{"embedding": [score]}, ...]."""
    entries = reply if isinstance(reply, list) else [reply]
    values = []
    for entry in entries:
        scores = entry.get("embedding") if isinstance(entry, dict) else None
        if not isinstance(scores, list) or len(scores) != 1:
            raise ValueError("each entry must have one number in `embedding`, as a model with one label gives")
        values += scores
    return finite(values, count)
