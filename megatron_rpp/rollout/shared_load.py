"""Tokens that all replicas have in flight on each server, in the job's store."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist


class SharedLoad:
    """One leader's view. A sum a server, in the store: a replica that fails takes back what it has added."""

    def __init__(self, store: dist.Store) -> None:
        self._store = dist.PrefixStore("rollout/load", store)
        self._known: set[str] = set()  # URLs that have a key

    def add(self, url: str, tokens: int) -> None:
        """Change what is in flight on a server; all replicas see it from now on."""
        self._store.add(url, tokens)

    def look(self, urls: Sequence[str]) -> dict[str, int]:
        """Tokens in flight on each server, those of this replica too."""
        for url in urls:
            if url not in self._known:
                self._store.add(url, 0)  # a key that nobody has set would be waited for
                self._known.add(url)
        values = self._store.multi_get(list(urls))
        return {url: int(value) for url, value in zip(urls, values, strict=True)}
