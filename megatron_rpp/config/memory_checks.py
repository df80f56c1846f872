"""Which of memory.offload can act."""

from __future__ import annotations

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.ranges import require_distinct
from megatron_rpp.config.schema import Config


def check_offload(config: Config) -> None:
    """Raises ConfigError."""
    named = config.memory.offload
    require_distinct("memory.offload", named)
    if "reference" in named and not config.algorithm.uses_reference:
        raise ConfigError(
            "memory.offload=reference must go with a KL, such as algorithm.kl_coef=0.01; without one there is no "
            "reference"
        )
