"""Trained weights to the SGLang servers."""

import megatron_rpp.device  # noqa: F401 - before any import of megatron
