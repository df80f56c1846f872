"""The recorded lengths of long chain-of-thought responses, batches drawn from them; modes of the rollout half."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "data" / "long_cot_lengths.json"
PROMPTS, SAMPLES = 16, 4  # of a step, in the rollout half
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "over_sampling_1.25": {"schedule.over_sampling": 1.25},
    "over_sampling_1.5": {"schedule.over_sampling": 1.5},
    "over_sampling_2": {"schedule.over_sampling": 2.0},
}


@dataclass(frozen=True)
class Lengths:
    """Of responses, in tokens: a tuple for each prompt, of its samples."""

    groups: tuple[tuple[int, ...], ...]
    limit: int  # responses were cut here
    prompt_tokens: int  # of every prompt

    @property
    def longest_row(self) -> int:
        """Prompt and response."""
        return self.prompt_tokens + self.limit

    def scaled(self, factor: float) -> Lengths:
        """Every length divided by `factor`, at least 1."""

        def short(tokens: int) -> int:
            return max(1, round(tokens / factor))

        groups = tuple(tuple(short(tokens) for tokens in group) for group in self.groups)
        return replace(self, groups=groups, limit=short(self.limit), prompt_tokens=short(self.prompt_tokens))

    def draw(self, rng: random.Random, prompts: int, samples: int) -> list[list[int]]:
        """Response lengths of a rollout batch, a list a prompt: prompts with, their samples without replacement."""
        return [rng.sample(rng.choice(self.groups), samples) for _ in range(prompts)]

    def quantiles(self, count: int) -> list[int]:
        """`count` lengths that stand for all: of as many equal parts of the sorted ones, the middle."""
        flat = sorted(tokens for group in self.groups for tokens in group)
        return [flat[int((i + 0.5) / count * len(flat))] for i in range(count)]

    def describe(self) -> dict[str, float]:
        """What kind of tail it is."""
        flat = sorted(tokens for group in self.groups for tokens in group)
        return {
            "prompts": len(self.groups),
            "responses": len(flat),
            "mean": statistics.fmean(flat),
            "median": statistics.median(flat),
            "p95": flat[int(0.95 * len(flat))],
            "max": flat[-1],
            "mean_over_max": statistics.fmean(flat) / flat[-1],
            "at_limit": sum(tokens == self.limit for tokens in flat) / len(flat),
        }


def load(path: Path = RECORD) -> Lengths:
    """The record; benchmarks/data/long_cot_lengths.json says where it is from."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    groups = tuple(tuple(group) for group in record["groups"])
    return Lengths(groups, record["limit"], record["prompt_tokens"])
