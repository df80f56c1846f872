"""One parameter of a server while its parts come in, and its digest on every rank."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_rpp.weight_sync.digests import Digest, new_digest
from megatron_rpp.weight_sync.server_cuts import Cutter
from megatron_rpp.weight_sync.server_layout import Part


class ServerParameter:
    """A server parameter some of whose parts have come: a digest for each rank of each TP size."""

    def __init__(self, part: Part, cutters: Sequence[Cutter], device: str) -> None:
        self.count, self.taken, self.names = part.count, 0, list[str]()
        self._is_cut, self._cutters = part.axis is not None, cutters
        self._waiting: dict[int, tuple[Part, Tensor]] = {}  # came before a part that lies ahead of them
        ranks = {c.tp_size: c.tp_size if self._is_cut else 0 for c in cutters}
        self._digests: dict[int, list[Digest]] = {n: [new_digest(device) for _ in range(k)] for n, k in ranks.items()}
        self._whole = new_digest(device)  # of a parameter that all ranks hold alike

    @property
    def is_complete(self) -> bool:
        return self.taken == self.count

    def add(self, name: str, part: Part, tensor: Tensor) -> None:
        if part.index < self.taken or part.index in self._waiting:
            raise ValueError(f"{name} came twice")
        self.names.append(name)
        self._waiting[part.index] = (part, tensor)
        while (following := self._waiting.pop(self.taken, None)) is not None:
            self._hash(*following)
            self.taken += 1

    def finish(self) -> dict[int, list[str]]:
        """TP size -> [rank]."""
        if self._is_cut:
            return {tp_size: [digest.finish() for digest in ranks] for tp_size, ranks in self._digests.items()}
        digest = self._whole.finish()
        return {cutter.tp_size: [digest] * cutter.tp_size for cutter in self._cutters}

    def _hash(self, part: Part, tensor: Tensor) -> None:
        values = part.of(tensor.detach())
        if not self._is_cut:
            self._whole.update(values)
            return
        for cutter in self._cutters:
            for digest, pieces in zip(
                self._digests[cutter.tp_size], cutter.shares(values, part.axis, part.dim), strict=True
            ):
                for piece in pieces:
                    digest.update(piece)
