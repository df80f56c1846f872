"""Which servers have seen which beginnings of prompts, and so hold them in their prefix caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

BLOCK = 16
"""Beginnings are compared in whole blocks of so many tokens; a shorter one is no use to anybody."""


class PrefixTable:
    """Of one sampling call: a weight sync empties the servers' caches. Equal hashes are taken for equal tokens."""

    def __init__(self) -> None:
        self._holders: dict[int, set[str]] = {}  # hash of a beginning -> URLs

    def add(self, url: str, token_ids: Sequence[int]) -> None:
        """The server at `url` was sent this prompt."""
        for key in _beginnings(token_ids):
            self._holders.setdefault(key, set()).add(url)

    def known(self, token_ids: Sequence[int]) -> dict[str, int]:
        """URL -> how many of the first tokens that server has seen in one prompt; servers with none are left out."""
        found: dict[str, int] = {}
        for number, key in enumerate(_beginnings(token_ids), start=1):
            holders = self._holders.get(key)
            if not holders:
                break
            found |= dict.fromkeys(holders, number * BLOCK)
        return found


def _beginnings(token_ids: Sequence[int]) -> Iterator[int]:
    """A hash of the first block, of the first two, and so on."""
    key = 0
    for end in range(BLOCK, len(token_ids) + 1, BLOCK):
        key = hash((key, *token_ids[end - BLOCK : end]))
        yield key
