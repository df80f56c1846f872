"""JSONL files, read with errors that name the line. Imports no torch: pre-flight checks use it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Record = tuple[int, dict[str, Any]]  # line number from 1, object


def read_jsonl(path: str | Path) -> Iterator[Record]:
    """Each object of a JSONL file with its line number. Blank lines are skipped.

    Raises:
        ValueError: no such file, or no objects in it; a line that is not UTF-8, not JSON or not an object
            (`PATH:LINE: ...`).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a JSONL file, one object a line")
    found = False
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                found = True
                yield number, _parse(raw, f"{path}:{number}")
    if not found:
        raise ValueError(f"{path}:1: the file holds no objects; write one JSON object a line")


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno}); one object a line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; endless nesting
        raise ValueError(f"{where}: cannot be read ({error}); write one plain JSON object a line") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {_json_type(value)}, not an object; write one JSON object a line")
    return value


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def first_present(record: dict[str, Any], keys: Sequence[str], where: str) -> str:
    """The first of `keys` that the object has, as text. Strings and numbers are accepted.

    Raises:
        ValueError: none of the keys is there, or the value is neither text nor a number.
    """
    for key in keys:
        if key in record:
            value = record[key]
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError(f"{where}: `{key}` must be text or a number, not {_json_type(value)}")
            return str(value)
    wanted = " or ".join(f"`{key}`" for key in keys)
    raise ValueError(f"{where}: no {wanted}; the object has {list_names(record)}")


def list_names(names: Iterable[str]) -> str:
    """`a`, `b`, `c` for an error message; "no keys" where there are none."""
    return ", ".join(f"`{name}`" for name in names) or "no keys"


def check_jsonl(path: str | Path, required_keys: Sequence[str | tuple[str, ...]], limit: int | None = None) -> int:
    """Reads a JSONL file before anything heavy is imported, and returns its number of objects.

    Args:
        path: the file.
        required_keys: keys that every object must have; a tuple means any one of them.
        limit: objects to look at; None for all.

    Raises:
        ValueError: as `read_jsonl`, or a required key is missing (`PATH:LINE: ...`).
    """
    count = 0
    for number, record in read_jsonl(path):
        if limit is not None and count >= limit:
            break
        for keys in required_keys:
            first_present(record, (keys,) if isinstance(keys, str) else keys, f"{path}:{number}")
        count += 1
    return count
