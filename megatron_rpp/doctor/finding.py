"""What a check found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

Status = Literal["ok", "warn", "fail"]
Value = TypeVar("Value", bound=Hashable)

_SHOWN = 4  # names in a sentence


@dataclass(frozen=True)
class Finding:
    """One answer of a check; every check has at least one."""

    check: str
    status: Status
    found: str
    remedy: str = ""
    node: str = ""  # empty: of the job as a whole
    blames_node: bool = False  # another node in its place would do; else the fault goes with the job


def faults(
    check: str,
    messages: Mapping[str, str],
    asked: Iterable[str],
    remedy: str,
    *,
    status: Status = "fail",
    travels: bool = True,
) -> list[Finding]:
    """A finding for each node with a message; one for the job where every node asked says the same.

    travels: whether a job of one node would meet the fault on any other, as a wrong file on a shared folder.
    """
    nodes = list(asked)
    if len(messages) == len(nodes) and len(set(messages.values())) == 1 and (len(nodes) > 1 or travels):
        where = nodes[0] if len(nodes) == 1 else ""
        prefix = f"on all {len(nodes)} nodes: " if len(nodes) > 1 else ""
        return [Finding(check, status, prefix + messages[nodes[0]], remedy, where)]
    return [Finding(check, status, found, remedy, node, status == "fail") for node, found in messages.items()]


def accuse(pairs: Sequence[tuple[str, str]], nodes: Iterable[str]) -> dict[str, list[str]]:
    """Who is at fault where `asker` could not do something with `target`: {node: the other ends}.

    A target that nobody else could do it with is at fault itself, where there are two others to say so.
    """
    others = len(list(nodes)) - 1
    complaints = Counter(target for _, target in pairs)
    accused: dict[str, list[str]] = {}
    for asker, target in pairs:
        target_is = others >= 2 and complaints[target] == others
        accused.setdefault(target if target_is else asker, []).append(asker if target_is else target)
    return accused


def most_common(values: Mapping[str, Value]) -> Value:
    """The value that most nodes have; of equally many, the first node's."""
    return Counter(values.values()).most_common(1)[0][0]


def in_words(names: Sequence[str]) -> str:
    """`a, b and 5 more`."""
    if len(names) <= _SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[: _SHOWN - 1])} and {len(names) - _SHOWN + 1} more"
