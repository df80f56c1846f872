"""Megatron distributed checkpoints of a run."""

import megatron_rpp.device  # noqa: F401 - before any import of megatron
