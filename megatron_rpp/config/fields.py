"""The schema as a flat table: `section.key` -> type, default and docstring."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from megatron_rpp.config import algorithm, data, job, performance, reward, rollout, schema
from megatron_rpp.config.schema import Config

NAME = "NAME"
"""Stands in a key for the name that the user gives a section: data.sources.NAME.path."""


@dataclass(frozen=True)
class Field:
    """One setting."""

    key: str  # dotted: "data.train.path", "data.sources.NAME.path"
    type: Any  # int, float, bool, str, tuple[str, ...], tuple[int, ...] or dict[str, Any]
    default: Any
    doc: str


@cache
def fields() -> dict[str, Field]:
    """Every setting by its dotted key, in the schema's order."""
    return {item.key: item for item in _walk(Config(), "", _docstrings())}


def canonical(key: str) -> str:
    """`key` as `fields` knows it: data.sources.math.path is data.sources.NAME.path."""
    for prefix in _named_sections():
        if key.startswith(prefix):
            _, dot, rest = key.removeprefix(prefix).partition(".")
            return f"{prefix}{NAME}{dot}{rest}"
    return key


def name_in(key: str) -> str:
    """The name that the user gave the section of `key`; "" where its sections have none."""
    prefix = next((prefix for prefix in _named_sections() if key.startswith(prefix)), None)
    return "" if prefix is None else key.removeprefix(prefix).partition(".")[0]


def flatten(config: Config) -> dict[str, Any]:
    """The values of `config` by dotted key."""
    return dict(_values(config, ""))


def _values(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for item in dataclasses.fields(node):
        key, value = prefix + item.name, getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value, key + ".")
        elif key + "." in _named_sections():
            for name, section in value.items():
                yield from _values(section, f"{key}.{name}.")
        else:
            yield key, value


def build(values: Mapping[str, Any]) -> Config:
    """A Config with `values` (dotted key -> value of the right type) over the defaults."""
    config = Config()
    for key, value in values.items():
        config = _replaced(config, key.split("."), value)
    return config


def _replaced(node: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    if rest:
        child = getattr(node, name)
        if isinstance(child, dict):
            section = child[rest[0]] if rest[0] in child else _section_type(get_type_hints(type(node))[name])()
            value = {**child, rest[0]: _replaced(section, rest[1:], value)}
        else:
            value = _replaced(child, rest, value)
    return dataclasses.replace(node, **{name: value})


def _walk(node: Any, prefix: str, docs: Mapping[tuple[str, str], str]) -> Iterator[Field]:
    types = get_type_hints(type(node))
    for item in dataclasses.fields(node):
        key, value = prefix + item.name, getattr(node, item.name)
        section = _section_type(types[item.name])
        if section is not None:
            yield from _walk(section(), f"{key}.{NAME}.", docs)
        elif dataclasses.is_dataclass(value):
            yield from _walk(value, key + ".", docs)
        else:
            yield Field(key, types[item.name], value, docs.get((type(node).__name__, item.name), ""))


def _section_type(kind: Any) -> Any:
    """The class of the sections in a `dict[str, CLASS]`; None for other types."""
    entry = get_args(kind)[1] if get_origin(kind) is dict else None
    return entry if dataclasses.is_dataclass(entry) else None


@cache
def _named_sections() -> tuple[str, ...]:
    """What stands before the NAME of a key: "data.sources."."""
    mark = f".{NAME}."
    return tuple(dict.fromkeys(key.partition(mark)[0] + "." for key in fields() if mark in key))


def _docstrings() -> dict[tuple[str, str], str]:
    """(class, field) -> the string literal under the field. Python drops it, so the source is parsed."""
    found: dict[tuple[str, str], str] = {}
    trees = [
        ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        for module in (schema, algorithm, job, performance, rollout, reward, data)
    ]
    for node in (node for tree in trees for node in tree.body):
        if not isinstance(node, ast.ClassDef):
            continue
        for item, below in zip(node.body, node.body[1:], strict=False):
            if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[node.name, item.target.id] = str(below.value.value)
    return found
