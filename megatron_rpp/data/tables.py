"""Rows of parquet files and of Hugging Face `datasets` on disk. Imports no torch, and both libraries only when used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_rpp.config.data import SourceConfig
from megatron_rpp.config.sources import parquet_files

Row = tuple[str, dict[str, Any]]  # how an error names it, values by column
Columns = dict[str, Any]  # nested columns by name; None where a column is not nested
_ROWS_READ = 256  # at once
_MISSING = "kind = {} needs the package {}: pip install 'megatron_rpp[data]' ({})"


def parquet_rows(source: SourceConfig) -> Iterator[Row]:
    """Each row of each file, in the order of the files' names; an error names FILE and the row's number, from 0.

    Raises:
        ValueError: pyarrow is missing, there is no file, or one cannot be read.
    """
    pyarrow = _pyarrow()
    for path in _files(source):
        row = 0
        try:
            with _open(path) as file:
                for batch in file.iter_batches(batch_size=_ROWS_READ):
                    for record in batch.to_pylist():
                        yield f"{path}: row {row}", _plain(record)
                        row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: row {row} or a later one cannot be read: {error}") from error


def parquet_columns(source: SourceConfig) -> Iterator[tuple[str, Columns]]:
    """(file, its columns) of each file, from its end alone."""
    for path in _files(source):
        with _open(path) as file:
            yield str(path), _tree(file.schema_arrow)


def saved_rows(source: SourceConfig) -> Iterator[Row]:
    """Each row that `Dataset.save_to_disk` wrote, by its number from 0, as `dataset[N]` counts.

    Raises:
        ValueError: the library is missing, the folder cannot be read, or `split` is missing or wrong.
    """
    row = 0
    for table in open_saved(source).with_format("arrow").iter(batch_size=_ROWS_READ):  # media stay undecoded
        for record in table.to_pylist():
            yield f"{source.path}: row {row}", _plain(record)
            row += 1


def saved_columns(source: SourceConfig) -> Iterator[tuple[str, Columns]]:
    """(folder, its columns), as `parquet_columns` has them. Raises as `saved_rows`."""
    yield source.path, _tree(open_saved(source).features.arrow_schema)


def _tree(fields: Iterable[Any]) -> Columns:
    """Of an arrow schema, or of a column of kind struct."""
    struct = _pyarrow().types.is_struct
    return {field.name: _tree(field.type) if struct(field.type) else None for field in fields}


def open_saved(source: SourceConfig) -> Any:
    """The `datasets.Dataset` of a source, memory-mapped. Raises as `saved_rows`."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(_MISSING.format("huggingface", "datasets", error)) from error
    try:
        found = datasets.load_from_disk(source.path)
    except Exception as error:  # of many kinds, by what is broken
        raise ValueError(f"{source.path}: datasets cannot load this folder: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        if source.split not in found:
            raise ValueError(f"{source.path}: set `split` of the source to one of: {', '.join(found)}")
        return found[source.split]
    if source.split:
        raise ValueError(f"{source.path}: holds one dataset without splits; leave out split={source.split}")
    return found


def _plain(value: Any) -> Any:
    """`value` of what JSON can hold, as rewards send it to services: dates and such as text, bytes as their number."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return f"({len(value)} bytes)" if isinstance(value, bytes) else str(value)


def _files(source: SourceConfig) -> list[Path]:
    files = parquet_files(source.path)
    if not files:
        raise ValueError(f"{source.path}: no parquet file here")
    return files


def _open(path: Path) -> Any:
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a parquet file: {error}") from error


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(_MISSING.format("parquet", "pyarrow", error)) from error
    return pyarrow
