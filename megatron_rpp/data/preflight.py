"""What can be told about the problems of a run before it starts. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from megatron_rpp.config.data import DataConfig, SourceConfig
from megatron_rpp.config.templates import template_paths
from megatron_rpp.data.jsonl import list_names
from megatron_rpp.data.problems import descend, read_problems
from megatron_rpp.data.questions import template_of
from megatron_rpp.data.tables import parquet_columns, saved_columns


def check_problems(source: SourceConfig, data: DataConfig, *, needs_answer: bool, needs_pass_rate: bool) -> None:
    """Every line of a JSONL file; of tables the columns, nested ones too; of a generated source the first problem.

    Raises:
        ValueError: as `read_problems`; a column that is not there.
    """
    if source.kind in _COLUMNS:
        _check_columns(source, data, needs_answer=needs_answer, needs_rate=needs_pass_rate or source.is_filtered)
        return
    found = read_problems(source, data, needs_answer=needs_answer, needs_pass_rate=needs_pass_rate)
    for _ in islice(found, 1) if source.kind == "reasoning_gym" else found:
        pass


_COLUMNS: dict[str, Callable[[SourceConfig], Any]] = {"parquet": parquet_columns, "huggingface": saved_columns}


def _check_columns(source: SourceConfig, data: DataConfig, *, needs_answer: bool, needs_rate: bool) -> None:
    key, template = template_of(source, data)
    keys = [source.answer_key] if needs_answer else []
    keys += [source.pass_rate_key] if needs_rate else []
    for where, columns in _COLUMNS[source.kind](source):
        for wanted in keys:
            inner, last = descend(columns, wanted)
            if last not in inner:
                raise ValueError(f"{where}: no column `{wanted}`; there are {list_names(inner)}")
        for path in template_paths(template, key):
            _check_path(columns, path, f"{where}: no column `{'.'.join(path)}`, which {key} names")


def _check_path(columns: Mapping[str, Any], path: tuple[str, ...], message: str) -> None:
    """What is within a list or a text is for the rows to tell."""
    inner: Any = columns
    for part in path:
        if not isinstance(inner, Mapping):
            return
        if part not in inner:
            raise ValueError(f"{message}; there are {list_names(inner)}")
        inner = inner[part]
