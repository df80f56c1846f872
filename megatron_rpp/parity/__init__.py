"""Whether trainer and engine mean the same by a log-prob, and if not, why."""

import megatron_rpp.device  # noqa: F401 - before any import of megatron
