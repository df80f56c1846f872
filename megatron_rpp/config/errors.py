"""The user's mistakes."""

from __future__ import annotations


class ConfigError(ValueError):
    """A value that the user must change; the message says which, and to what."""
