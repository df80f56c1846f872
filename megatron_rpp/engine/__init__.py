"""What runs on the models: scoring, advantages, optimizer steps."""

import megatron_rpp.device  # noqa: F401 - before any import of megatron
