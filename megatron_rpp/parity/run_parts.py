"""The parts of a run that the search for a cause asks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rpp.config.schema import Config
from megatron_rpp.data.tokenizer import Tokenizer
from megatron_rpp.model.build import Model
from megatron_rpp.rollout.sglang_client import SGLangClient
from megatron_rpp.weight_sync.synced_engine import SyncedRolloutEngine


@dataclass(frozen=True)
class RunParts:
    """Of one rank."""

    config: Config
    policy: Model
    engine: SyncedRolloutEngine
    client: SGLangClient  # the engine's; its `urls` are the serving servers
    tokenizer: Tokenizer
