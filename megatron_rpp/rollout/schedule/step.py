"""What a step samples: its draw, and how."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from megatron_rpp.data.prompt_source import Draw
from megatron_rpp.rollout.protocol import SamplingParams
from megatron_rpp.rollout.schedule.quota import Quota


@dataclass(frozen=True)
class Step:
    """The same on all leaders, but for the clock."""

    name: str  # no other draw of the job has it
    draws: Sequence[Draw]
    quota: Quota
    sampling: SamplingParams
    first_group_id: int = 0  # of the draw; the samples' seeds derive from it
    began: float = field(default_factory=time.monotonic)  # the first draw of the step; budgets are of them all
    tokens_before: int = 0  # as Counts.tokens, of the step's earlier draws

    @cached_property
    def awaited(self) -> frozenset[int]:
        """Indices in the draw: of what is not aborted."""
        return frozenset(self.quota.awaited(self.draws))
