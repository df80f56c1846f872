"""The schema as a flat table: `section.key` -> type, default and docstring."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from megatron_rpp.config import data, job, reward, rollout, schema
from megatron_rpp.config.schema import Config


@dataclass(frozen=True)
class Field:
    """One setting."""

    key: str  # dotted: "data.train.path"
    type: Any  # int, float, bool, str, tuple[str, ...] or dict[str, Any]
    default: Any
    doc: str


@cache
def fields() -> dict[str, Field]:
    """Every setting by its dotted key, in the schema's order."""
    return {item.key: item for item in _walk(Config(), "", _docstrings())}


def flatten(config: Config) -> dict[str, Any]:
    """The values of `config` by dotted key."""
    return {key: lookup(config, key) for key in fields()}


def lookup(config: Config, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def build(values: Mapping[str, Any]) -> Config:
    """A Config with `values` (dotted key -> value of the right type) over the defaults."""
    config = Config()
    for key, value in values.items():
        config = _replaced(config, key.split("."), value)
    return config


def _replaced(node: Any, path: list[str], value: Any) -> Any:
    if len(path) > 1:
        value = _replaced(getattr(node, path[0]), path[1:], value)
    return dataclasses.replace(node, **{path[0]: value})


def _walk(node: Any, prefix: str, docs: Mapping[tuple[str, str], str]) -> Iterator[Field]:
    types = get_type_hints(type(node))
    for item in dataclasses.fields(node):
        key, value = prefix + item.name, getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(value, key + ".", docs)
        else:
            yield Field(key, types[item.name], value, docs.get((type(node).__name__, item.name), ""))


def _docstrings() -> dict[tuple[str, str], str]:
    """(class, field) -> the string literal under the field. Python drops it, so the source is parsed."""
    found: dict[tuple[str, str], str] = {}
    trees = [
        ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        for module in (schema, job, rollout, reward, data)
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
