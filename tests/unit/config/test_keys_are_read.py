"""A setting that no code reads misleads its user; peers have them. This finds ours."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import megatron_rpp
from megatron_rpp.config import Config
from megatron_rpp.config.fields import fields

PACKAGE = Path(megatron_rpp.__file__).parent


def config_classes(node: Any, key: str = "") -> dict[str, str]:
    """Section key -> class name: {"": "Config", "rollout": "RolloutConfig", "data.sources.NAME": "SourceConfig"}."""
    found = {key: type(node).__name__}
    types = get_type_hints(type(node))
    for item in dataclasses.fields(node):
        value, name = getattr(node, item.name), f"{key}.{item.name}" if key else item.name
        named = next(filter(dataclasses.is_dataclass, get_args(types[item.name])), None)  # dict[str, SourceConfig]
        if named is not None:
            found |= config_classes(named(), f"{name}.NAME")
        elif dataclasses.is_dataclass(value):
            found |= config_classes(value, name)
    return found


CLASSES = config_classes(Config())


def name_of(node: ast.expr) -> str:
    """The last identifier of `a.b.c`, `c` or `"C"`; "" for other expressions."""
    if isinstance(node, ast.Constant):
        return str(node.value).rsplit(".", 1)[-1]
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def aliases(tree: ast.Module) -> set[tuple[str, str]]:
    """(name, class): the class itself, by annotation `config: RolloutConfig`, or by `sampling = config.rollout`."""
    by_section = {(key.rsplit(".", 1)[-1], name) for key, name in CLASSES.items() if key}
    found = by_section | {(name, name) for name in CLASSES.values()}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            found.add((node.arg, name_of(node.annotation)))
        elif isinstance(node, ast.AnnAssign):
            found.add((name_of(node.target), name_of(node.annotation)))
        elif isinstance(node, ast.Assign):
            targets, values = node.targets, [node.value]
            if isinstance(targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                targets, values = targets[0].elts, node.value.elts
            for target, value in zip(targets, values, strict=False):
                found |= {(name_of(target), name) for section, name in by_section if section == name_of(value)}
    return found | entries(tree)


def entries(tree: ast.Module) -> set[tuple[str, str]]:
    """(name, class) of what loops over named sections: `for name, source in config.data.sources.items()`."""
    tables = {(key.split(".")[-2], name) for key, name in CLASSES.items() if key.endswith(".NAME")}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and isinstance(node.annotation, ast.Subscript):
            tables |= {
                (node.arg, name) for name in CLASSES.values() if re.search(rf"\b{name}\b", ast.unparse(node.annotation))
            }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.comprehension) and isinstance(node.iter, ast.Call):
            method = node.iter.func
            if isinstance(method, ast.Attribute) and method.attr in ("items", "values"):
                target = node.target.elts[-1] if isinstance(node.target, ast.Tuple) else node.target
                found |= {(name_of(target), name) for table, name in tables if table == name_of(method.value)}
    return found


def reads(source: str) -> set[tuple[str, str]]:
    """(class, field) of every attribute that is read off something that holds a configuration class."""
    tree = ast.parse(source)
    known = aliases(tree)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found |= {(name, node.attr) for alias, name in known if alias == name_of(node.value)}
    return found


def unread(sources: list[str]) -> list[str]:
    found = set().union(*map(reads, sources))
    return [key for key in fields() if (CLASSES[key.rpartition(".")[0]], key.rpartition(".")[2]) not in found]


def test_every_key_is_read_by_code_outside_the_config_package() -> None:
    # The command line only checks values, as the config package does; but for load.py, which applies the preset.
    checkers = {PACKAGE / "cli.py", *(PACKAGE / "config").glob("*.py")} - {PACKAGE / "config" / "load.py"}
    sources = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py") if path not in checkers]
    assert unread(sources) == [], "no code reads these keys: use them or remove them"


def test_the_scan_sees_reads_by_section_annotation_and_alias() -> None:
    source = """
def f(config: Config, sampling: RolloutConfig, source: "SourceConfig"):
    prompts, tuning = config.rollout.num_prompts, config.optimizer
    return sampling.port, source.kind, tuning.lr, other.top_p
"""
    found = reads(source)
    wanted = {("RolloutConfig", "num_prompts"), ("RolloutConfig", "port"), ("SourceConfig", "kind")}
    assert wanted | {("OptimizerConfig", "lr")} <= found
    assert ("RolloutConfig", "top_p") not in found  # `other` is not known to be a configuration
    assert "rollout.top_p" in unread([source]) and "rollout.port" not in unread([source])


def test_the_scan_sees_reads_of_named_sections_in_loops() -> None:
    source = """
def f(config: Config, known: Mapping[str, SourceConfig], other):
    return [s.weight for s in config.data.sources.values()] + [t.seed for name, t in known.items()] + other.split
"""
    found = reads(source)
    assert {("SourceConfig", "weight"), ("SourceConfig", "seed")} <= found and ("SourceConfig", "split") not in found
