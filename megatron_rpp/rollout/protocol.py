"""What is asked of servers that sample, and how that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn. `temperature` 0 is greedy."""

    num_samples_per_prompt: int
    max_response_tokens: int
    temperature: float
    top_p: float
    stop_token_ids: tuple[int, ...]
    seed: int  # of this call; each sample derives its own from it


class RolloutError(RuntimeError):
    """Sampling failed and retries did not help; says which server and why."""


ProgressCallback = Callable[[int, int], None]  # (responses done, responses asked)
