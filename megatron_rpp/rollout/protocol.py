"""What the loop asks of a rollout engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_rpp.experience.types import Prompt, Rollout


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


class RolloutEngine(Protocol):
    """Samples responses. Results come prompt by prompt, `num_samples_per_prompt` in a row."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, progress: ProgressCallback | None = None
    ) -> list[Rollout]: ...
