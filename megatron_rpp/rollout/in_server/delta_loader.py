"""SGLang's `--custom-weight-loader` for changed values only: see weight_sync/delta.py for the sender.

A POST carries, for the server's first TP rank, two uint8 tensors: MANIFEST, the JSON text {"first": bool, "tensors":
[[name, dtype, shape, start, bytes], ...]}, and BLOB, where each tensor's change (delta_codec) lies at its start.

SGLang (0.5.23) ends the whole server when a custom loader raises, and ignores what it returns. So a failure is
noted as an empty buffer of the model, whose name `/weights_checker` tells to whom asks for tensors without a
dot in their names; the next first POST takes it away.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_rpp.rollout.in_server.delta_codec import decode
from megatron_rpp.rollout.in_server.partial_tensor import PartialTensor
from megatron_rpp.rollout.in_server.shared_request import shared, tensor_parallel_group

LOADER = f"{__name__}.apply"
"""What the flag wants: the import path of `apply`."""
MANIFEST, BLOB = "rpp_delta_manifest", "rpp_delta_blob"
FAILED = "rpp_delta_failed_"
"""The name of a failure's buffer: this, then the message in UTF-8 as hexadecimal digits."""
_MAX_MESSAGE = 1000

logger = logging.getLogger(__name__)


class DeltaError(RuntimeError):
    """A change could not be loaded; the message names the tensor."""


def apply(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Load the changes of one POST into this rank's part of `model`. After a failure nothing more is loaded."""
    try:
        group, device = tensor_parallel_group(), next(model.parameters()).device
        load(model, shared(named_tensors, (MANIFEST, BLOB), group, device))
    except Exception as error:
        logger.exception("a weight delta could not be loaded")
        _note_failure(model, f"{type(error).__name__}: {error}")


def load(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """What `apply` does. Raises DeltaError."""
    parts = dict(named_tensors)
    if set(parts) != {MANIFEST, BLOB}:
        raise DeltaError(f"a delta is made of {MANIFEST} and {BLOB}, not of {', '.join(parts) or 'nothing'}")
    manifest = json.loads(parts[MANIFEST].cpu().numpy().tobytes())
    if manifest["first"]:
        _forget_failures(model)
    elif failures_of(model):
        return
    changes = _Changes(manifest["tensors"], parts[BLOB])
    try:
        with torch.no_grad():
            model.load_weights(iter(changes))  # type: ignore[operator]
    except Exception as error:
        raise DeltaError(f"{changes.current}: {type(error).__name__}: {error}") from error


def failures_of(model: nn.Module) -> list[str]:
    """Names of the buffers that note failures."""
    return [name for name in model._buffers if name.startswith(FAILED)]


class _Changes:
    """The tensors of a POST, each decoded when SGLang asks for it: at most one is in memory if SGLang keeps none."""

    def __init__(self, rows: list[list[Any]], blob: Tensor) -> None:
        self._rows, self._blob = rows, blob
        self.current = "before the first tensor"

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, dtype, shape, start, size in self._rows:
            self.current = name
            if not 0 <= start <= start + size <= self._blob.numel():
                raise ValueError("its bytes did not come with the manifest")
            change = decode(self._blob[start : start + size], getattr(torch, dtype), tuple(shape))
            if change.changed is None:
                yield name, change.values
            else:
                yield name, PartialTensor(change.values, change.changed)


def _note_failure(model: nn.Module, message: str) -> None:
    if not failures_of(model):  # the first one is the cause
        name = FAILED + message[:_MAX_MESSAGE].encode().hex()
        model.register_buffer(name, torch.zeros(1, dtype=torch.uint8), persistent=False)


def _forget_failures(model: nn.Module) -> None:
    for name in failures_of(model):
        delattr(model, name)
