"""How much memory a run needs on each GPU, and which layout fits: told without a GPU and without weights."""

import megatron_rpp.device  # noqa: F401 - before any import of megatron
from megatron_rpp.plan.estimate import plan
from megatron_rpp.plan.memory import Plan, StageMemory
from megatron_rpp.plan.suggest import Suggestion, suggest

__all__ = ["Plan", "StageMemory", "Suggestion", "plan", "suggest"]
