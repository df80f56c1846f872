"""Configuration: schema, loading and validation. Imports no torch."""

from megatron_rpp.config.schema import Config

__all__ = ["Config"]
