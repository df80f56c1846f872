"""A Config as TOML text, which reads back as the same Config, and a value as messages have it."""

from __future__ import annotations

import datetime
import json
from typing import Any

from megatron_rpp.config.fields import flatten
from megatron_rpp.config.schema import Config


def dump_toml(config: Config) -> str:
    """The resolved configuration as TOML, every key written out."""
    sections: dict[str, list[str]] = {}
    for key, value in flatten(config).items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(f"{name} = {_value(value)}\n")
    return "\n".join(f"[{section}]\n{''.join(lines)}" for section, lines in sections.items())


def written(value: Any) -> str:
    """`value` as a flag has it: true, 0.5, a text without quotes, a list with commas, a table in TOML."""
    if isinstance(value, list | tuple):
        return ",".join(map(written, value))
    return value if isinstance(value, str) else _value(value)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, dict):
        pairs = (f"{_string(str(name))} = {_value(item)}" for name, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    assert isinstance(value, datetime.date | datetime.time), f"TOML cannot hold {value!r}"
    return value.isoformat()


def _string(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which JSON leaves bare and TOML forbids.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
