"""Megatron-Core models, built from and exported to Hugging Face directories."""

import megatron_rpp.device  # noqa: F401 - before any import of megatron
