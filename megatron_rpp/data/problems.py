"""Problems of any source, formatted but not tokenized. Imports no torch: pre-flight checks use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_rpp.config.data import DataConfig, SourceConfig
from megatron_rpp.data.jsonl import first_present, list_names, read_jsonl
from megatron_rpp.data.questions import ask
from megatron_rpp.data.reasoning_gym import gym_problems
from megatron_rpp.data.tables import parquet_rows, saved_rows


class Record(NamedTuple):
    """An object, a row or a generated entry, as it is found."""

    where: str  # how an error names it: PATH:LINE, PATH: row N or TASK[INDEX]
    fields: dict[str, Any]  # what a prompt_template may name
    metadata: dict[str, Any]  # what the verifier may want


@dataclass(frozen=True)
class Problem:
    """One problem before tokenization."""

    where: str
    text: str  # for people to read
    turns: tuple[dict[str, Any], ...]  # of a conversation; empty: `text` is what is asked
    answer: str
    metadata: dict[str, Any]
    pass_rate: float | None  # None where nobody asks for it


@dataclass
class Tally:
    """What became of the records of a source."""

    used: int = 0
    filtered: int = 0  # left out by their pass rate
    has_more: bool = False  # behind the last one that `size` leaves room for

    def __str__(self) -> str:
        more = "; more are left unread" if self.has_more else ""
        return f"{self.used} problems used, {self.filtered} left out by their pass rate{more}"


def read_problems(
    source: SourceConfig,
    data: DataConfig,
    *,
    needs_answer: bool = True,
    needs_pass_rate: bool = False,
    tally: Tally | None = None,
) -> Iterator[Problem]:
    """The problems that the source's filter lets through: all, or the first `source.size`.

    Args:
        source: where they are.
        data: gives chat_template, and prompt_template where the source has none.
        needs_answer: a problem without one is an error; else its answer is "".
        needs_pass_rate: so is one without a pass rate, as it always is where the source is filtered.
        tally: new; is filled, and right once the last problem has been taken.

    Raises:
        ValueError: a record that cannot be read, a key that is missing or of the wrong kind, a filter that leaves
            nothing.
    """
    needs_pass_rate = needs_pass_rate or source.is_filtered
    tally = tally or Tally()
    records = read_records(source)
    for where, fields, metadata in records:
        pass_rate = _pass_rate(fields, source.pass_rate_key, where) if needs_pass_rate else None
        if pass_rate is not None and not source.min_pass_rate <= pass_rate <= source.max_pass_rate:
            tally.filtered += 1
            continue
        text, turns = ask(source, data, fields, where)
        answer = answer_of(fields, source.answer_key, where, is_needed=needs_answer)
        tally.used += 1
        yield Problem(where, text, turns, answer, metadata, pass_rate)
        if tally.used == source.size:
            tally.has_more = next(records, None) is not None
            return
    if not tally.used and not tally.filtered:
        raise ValueError(f"{source.path}: holds no problems; one row is one problem")
    if not tally.used:
        raise ValueError(
            f"{source.path}: none of its {tally.filtered} problems has a `{source.pass_rate_key}` from "
            f"{source.min_pass_rate} to {source.max_pass_rate}; widen min_pass_rate and max_pass_rate of the source"
        )


def read_records(source: SourceConfig) -> Iterator[Record]:
    """Everything that a source holds, or generates."""
    assert source.kind in _READERS, source.kind  # config/ranges.py has the same kinds
    return _READERS[source.kind](source)


def _jsonl_records(source: SourceConfig) -> Iterator[Record]:
    return (Record(f"{source.path}:{number}", found, found) for number, found in read_jsonl(source.path))


def _table_records(source: SourceConfig) -> Iterator[Record]:
    rows = {"parquet": parquet_rows, "huggingface": saved_rows}[source.kind](source)
    return (Record(where, found, found) for where, found in rows)


def _gym_records(source: SourceConfig) -> Iterator[Record]:
    return (Record(f"{source.task}[{i}]", *found) for i, found in enumerate(gym_problems(source)))


_READERS: dict[str, Callable[[SourceConfig], Iterator[Record]]] = {
    "jsonl": _jsonl_records,
    "parquet": _table_records,
    "huggingface": _table_records,
    "reasoning_gym": _gym_records,
}


def answer_of(fields: Mapping[str, Any], key: str, where: str, *, is_needed: bool = True) -> str:
    """The right answer at `key`, which may be dotted; where it `is_needed`, it must be there, as text or a number."""
    inner, last = descend(fields, key)
    if not is_needed and inner.get(last) is None:
        return ""
    return first_present(inner, (last,), where)


def _pass_rate(fields: Mapping[str, Any], key: str, where: str) -> float:
    inner, last = descend(fields, key)
    rate = inner.get(last)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        found = f"it is {rate!r}" if last in inner else f"available: {list_names(inner)}"
        raise ValueError(f"{where}: `{key}` must be the problem's pass rate, a number from 0 to 1; {found}")
    return float(rate)


def descend(fields: Mapping[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """(the table that holds the last part of a dotted key, that part). A key that is there as it is written wins."""
    inner, rest = dict(fields), key
    while rest not in inner and "." in rest and isinstance(inner.get(rest.split(".")[0]), dict):
        first, rest = rest.split(".", 1)
        inner = inner[first]
    return inner, rest
