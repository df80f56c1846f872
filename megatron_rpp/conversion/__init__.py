"""Conversion between Hugging Face and Megatron directories, one parameter at a time."""

import megatron_rpp.device  # noqa: F401 - before any import of megatron
