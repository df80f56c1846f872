"""The sender's side of the delta transport: only values that changed since the last sync, bit for bit.

The receiver is rollout/in_server/delta_loader.py, which a server must be started with.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_rpp.device import dtype_name
from megatron_rpp.rollout.in_server.delta_codec import encode
from megatron_rpp.rollout.in_server.delta_loader import BLOB, FAILED, LOADER, MANIFEST
from megatron_rpp.weight_sync.export import JOINED, PARTNER, partner_of

ENDPOINT = "update_weights_from_tensor"
STATUS_SKIP = (".",)
"""For `rollout.control.checksums`: skips every weight, so that only failures of the loader are left."""
_NOTHING = base64.b64encode(pickle.dumps([])).decode()
_ALIGN = 8  # bytes; delta_codec.decode wants it


@dataclass(frozen=True)
class Piece:
    """One tensor's change."""

    name: str
    dtype: str  # such as "bfloat16"
    shape: tuple[int, ...]
    blob: Tensor  # [bytes] uint8, of delta_codec.encode
    dense_bytes: int  # of the whole tensor


@dataclass(frozen=True)
class DeltaBucket:
    """The changes that one POST carries."""

    pieces: tuple[Piece, ...]
    is_first: bool  # of an attempt; the servers forget failures of earlier ones
    may_overlap: bool = True  # see in_flight.Sendable

    @property
    def names(self) -> list[str]:
        return [piece.name for piece in self.pieces]

    @property
    def dense_bytes(self) -> int:
        """What these tensors take as a whole."""
        return sum(piece.dense_bytes for piece in self.pieces)

    @cached_property
    def entry(self) -> str:
        """What a server's first rank is sent, for all of them: base64 of pickled tensors."""
        rows = []
        places = [-(-piece.blob.numel() // _ALIGN) * _ALIGN for piece in self.pieces]
        blob, start = torch.zeros(sum(places), dtype=torch.uint8), 0
        for piece, place in zip(self.pieces, places, strict=True):
            size = piece.blob.numel()
            blob[start : start + size] = piece.blob
            rows.append([piece.name, piece.dtype, list(piece.shape), start, size])
            start += place
        text = json.dumps({"first": self.is_first, "tensors": rows}).encode()
        manifest = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return base64.b64encode(pickle.dumps([(MANIFEST, manifest), (BLOB, blob)])).decode()

    @property
    def wire_bytes(self) -> int:
        """What goes to each server, but for some 200 bytes of JSON."""
        return len(self.entry)


class DeltaEncoder:
    """Remembers what was last sent and turns new tensors into changes from it.

    Memory: one copy of the tensors on the host, in the dtype they are sent in. All servers that are sent changes
    must hold what was last encoded or remembered; after a failed sync one may hold a part of it: `forget` then.
    """

    def __init__(self) -> None:
        self._base: dict[str, Tensor] = {}

    def encode(self, tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[DeltaBucket]:
        """What changed, in buckets whose tensors take at most `max_bytes` as a whole; a larger one goes alone.

        The bound holds for the payload (before base64) and for what a server decodes of it. A tensor that is
        new or has another shape or dtype is sent as a whole. To be run to its end.
        """
        pending: list[Piece] = []
        is_first = True
        for name, tensor in tensors:
            piece = self._change(name, tensor)
            if piece is None:
                continue
            ready, pending = _split_off(pending, max_bytes - piece.dense_bytes)
            pending.append(piece)
            if ready:
                yield DeltaBucket(tuple(ready), is_first)
                is_first = False
        if pending:
            yield DeltaBucket(tuple(pending), is_first)

    def remember(self, name: str, tensor: Tensor) -> None:
        """`tensor` was sent as a whole by another transport."""
        self._keep(name, tensor.detach())

    def forget(self) -> None:
        """The next `encode` sends everything."""
        self._base.clear()

    def _change(self, name: str, tensor: Tensor) -> Piece | None:
        """None where nothing changed, and nothing needs to be sent."""
        new = tensor.detach().cpu()
        try:
            blob = encode(self._base.get(name), new)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        self._keep(name, new)
        if blob.numel() == 0 and JOINED not in name and PARTNER not in name:  # these travel together, changed or not
            return None
        return Piece(name, dtype_name(new.dtype), tuple(new.shape), blob, new.nbytes)

    def _keep(self, name: str, tensor: Tensor) -> None:
        old = self._base.get(name)
        if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
            old.copy_(tensor)
        else:
            self._base[name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def payload(bucket: DeltaBucket, tp_size: int) -> dict[str, object]:
    """Body of a POST to `ENDPOINT` of a server of `tp_size` ranks, which must be inside an update session.

    SGLang wants an entry a rank; the ranks behind the first get its tensors from it (in_server/shared_request.py).
    """
    entries = [bucket.entry, *[_NOTHING] * (tp_size - 1)]
    return {"serialized_named_tensors": entries, "load_format": LOADER, "flush_cache": False}


def forget_failures(tp_size: int) -> dict[str, object]:
    """Body of a POST to `ENDPOINT` that changes no weight and takes the servers' notes of failures away."""
    return payload(DeltaBucket((), is_first=True), tp_size)


def failures(ranks: Sequence[Mapping[str, object]]) -> list[str]:
    """What went wrong on a server's ranks since the first POST, from the reply of `control.checksums`.

    A server says 200 to a POST that its loader could not load; so ask (with skip=STATUS_SKIP) after the last.
    """
    found = []
    for index, rank in enumerate(ranks):
        checksums = rank["checksums"]
        assert isinstance(checksums, Mapping)
        notes = [name for name in checksums if name.startswith(FAILED)]
        found += [f"server rank {index}: {bytes.fromhex(note.removeprefix(FAILED)).decode()}" for note in notes]
    return found


def _split_off(pending: list[Piece], room: int) -> tuple[list[Piece], list[Piece]]:
    """(what goes now, what stays) so that a further piece fits if `room` is left beside what stays."""
    if sum(piece.dense_bytes for piece in pending) <= room:
        return [], pending
    names = {piece.name for piece in pending}
    waits = [JOINED in piece.name and partner_of(piece.name) not in names for piece in pending]
    stay = [piece for piece, wait in zip(pending, waits, strict=True) if wait]
    return [piece for piece, wait in zip(pending, waits, strict=True) if not wait], stay
