"""What a resumed run needs besides model and optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunState:
    """State after `step` rollout batches. Sampling seeds derive from run.seed and the step, so none is kept."""

    step: int  # rollout batches trained on; also the policy version
    prompts: dict[str, Any]  # cursor of the prompt source
    schedule: dict[str, Any]  # Megatron's OptimizerParamScheduler
    shaping: dict[str, Any] = field(default_factory=dict)  # engine.advantages.ShapingState
    parity: dict[str, float] = field(default_factory=dict)  # parity.monitor.ParityMonitor
    layout: dict[str, Any] = field(default_factory=dict)  # config section `parallel`; empty: an older version wrote it

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> RunState:
        return cls(**raw)
