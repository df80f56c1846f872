"""From TOML files and `--section.key=value` to a Config. Unknown keys and wrong types are errors."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fields import NAME, build, canonical, fields, name_in
from megatron_rpp.config.presets import preset_values
from megatron_rpp.config.schema import Config
from megatron_rpp.config.toml_text import dump_toml

__all__ = ["ConfigError", "describe", "dump_toml", "load_config"]

COMMAND_LINE = "the command line"
_GONE = "data.eval"  # no section: data.evals has the sets, eval says how they are measured


def load_config(toml_paths: Sequence[str], overrides: Sequence[str]) -> Config:
    """The defaults, then each file from left to right, then the command line's `--section.key=value`.

    A later value replaces an earlier one whole, lists and `task_args` included. algorithm.preset stands for
    the keys that it sets: it replaces what earlier files said, and a key beside it in the same file wins.

    Raises:
        ConfigError: a file that cannot be read or parsed, an unknown key or preset, or a wrong type.
    """
    layers = [{k: _checked(k, v, path) for k, v in _leaves(_read_toml(path), "")} for path in toml_paths]
    layers.append(dict(_parse_override(override) for override in overrides))
    values: dict[str, Any] = {}
    for layer in layers:
        values |= _preset_values(layer) | layer
    return build(values)


def _preset_values(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Every key that the preset of a file or of the command line, if it names one, stands for."""
    if "algorithm.preset" not in layer:
        return {}
    return {f"algorithm.{key}": value for key, value in preset_values(layer["algorithm.preset"]).items()}


def describe() -> list[tuple[str, str, Any, str]]:
    """(key, type, default, docstring) of every setting, for `--help`."""
    return [(item.key, type_name(item.type), item.default, item.doc) for item in fields().values()]


def type_name(kind: Any) -> str:
    """The type as a user writes it."""
    if get_origin(kind) is tuple:
        return f"list of {get_args(kind)[0].__name__}"
    return "table" if get_origin(kind) is dict else str(kind.__name__)


def _read_toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _leaves(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value); a table is descended into unless it is a table-valued setting."""
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and value and canonical(key) not in fields():
            yield from _leaves(value, key + ".")
        elif not (value == {} and _is_section(key)):
            yield key, value


def _is_section(key: str) -> bool:
    return any(known.startswith(canonical(key) + ".") for known in fields())


def _require_known(key: str, origin: str) -> None:
    if (name := name_in(key)) and not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(f"{key} in {origin}: the name {name!r} must be of letters, digits, _ and - only")
    if canonical(key) in fields():
        return
    if f"{key}.".startswith(f"{_GONE}."):
        meant = f"data.evals.{NAME}{key.removeprefix(_GONE)}"
        raise ConfigError(f"unknown key {key} in {origin}; a held-out set has a name: {meant}; or leave it out")
    if _is_section(key):
        raise ConfigError(f"{key} in {origin} is a section; set one of its keys, such as {_first_key(key)}")
    raise ConfigError(f"unknown key {key} in {origin}; {_suggestion(key)}")


def _first_key(section: str) -> str:
    first = next(known for known in fields() if known.startswith(canonical(section) + "."))
    return first.replace(NAME, name_in(section) or NAME)


def _suggestion(key: str) -> str:
    """The setting that was most likely meant: the same name in another section, else the nearest spelling."""
    wanted = canonical(key)
    same_name = [known for known in fields() if known.rsplit(".", 1)[-1] == wanted.rsplit(".", 1)[-1]]
    near = difflib.get_close_matches(wanted, same_name or list(fields()), n=1, cutoff=0.0 if same_name else 0.6)
    if not near:
        return "`rpp train --help` lists every key"
    return f"did you mean {near[0].replace(NAME, name_in(key) or NAME)}?"


def _checked(key: str, value: Any, origin: str) -> Any:
    """`value` from TOML as the setting's type. Only int -> float and list -> tuple are converted."""
    _require_known(key, origin)
    kind = fields()[canonical(key)].type
    if get_origin(kind) is tuple:
        if isinstance(value, list) and all(type(item) is get_args(kind)[0] for item in value):
            return tuple(value)
    elif get_origin(kind) is dict:
        if isinstance(value, dict):
            return value
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif type(value) is kind:  # not isinstance: a bool is an int in Python
        return value
    raise ConfigError(f"{key}={value!r} in {origin} must be of type {type_name(kind)}")


def _parse_override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    key = name.removeprefix("--")
    if not name.startswith("--") or not equals:
        raise ConfigError(f"cannot read the argument {text!r}; settings are written --section.key=value")
    _require_known(key, COMMAND_LINE)
    kind = fields()[canonical(key)].type
    try:
        return key, _checked(key, _parse_value(value, kind), COMMAND_LINE)
    except ValueError as error:
        raise ConfigError(f"{key}={value} on {COMMAND_LINE} must be of type {type_name(kind)}") from error


def _parse_value(text: str, kind: Any) -> Any:
    """The text of an override as `kind`. Raises ValueError."""
    if kind is bool:
        return {"true": True, "false": False}.get(text, text)
    if kind in (int, float, str):
        return kind(text)
    if get_origin(kind) is tuple and not text.startswith("["):
        return [get_args(kind)[0](item.strip()) for item in text.split(",") if item.strip()]
    return tomllib.loads(f"value = {text}")["value"]
