"""Messages of the probes: JSON on their standard output, in lines that srun neither cuts nor mixes.

srun carries a probe's output over SLURM's own connection, so that a node answers where the shared folder, the names
or the ports between nodes are broken. It passes output on in pieces of 1024 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_MARK = "rpp-probe"
_PIECE = 600  # characters, all of them ASCII


def to_lines(node: str, message: Mapping[str, Any]) -> list[str]:
    """Each with its newline."""
    text = json.dumps(message)
    pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
    return [f"{_MARK} {node} {i}/{len(pieces)} {piece}\n" for i, piece in enumerate(pieces, 1)]


class Assembler:
    """Puts the messages of many probes together, whose lines come in any mixture."""

    def __init__(self) -> None:
        self._begun: dict[str, list[str]] = {}

    def add(self, line: str) -> tuple[str, dict[str, Any]] | None:
        """(node, message) where the line completes one. Lines of others, such as a login script's, are passed over."""
        words = line.rstrip("\n").split(" ", 3)
        if len(words) != 4 or words[0] != _MARK:
            return None
        _, node, place, piece = words
        index, _, count = place.partition("/")
        if index == "1":
            self._begun[node] = []
        pieces = self._begun.setdefault(node, [])
        pieces.append(piece)
        if index != count:
            return None
        del self._begun[node]
        if len(pieces) != int(count):  # one is lost; the front's limit finds the node silent
            return None
        return node, dict(json.loads("".join(pieces)))
