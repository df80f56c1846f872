"""Weights to SGLang through a Hugging Face directory that trainer and servers both see."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_rpp.model.save_hf import partial_of, save_hf
from megatron_rpp.model.stage_export import StageExport
from megatron_rpp.weight_sync.in_flight import InFlight, post_all
from megatron_rpp.weight_sync.transport import Deadline, Shipment


class DiskTransport:
    """Writes its folder anew at each sync and has every server load it."""

    name = "disk"
    streams = False

    def __init__(self, *, folder: Path, seen_as: str, source: str, mtp: str = "keep") -> None:
        """seen_as: the folder's path on the servers. source: the directory of config.json and tokenizer.

        mtp: `keep` or `drop` the multi-token prediction layers of `source`, beside the policy.
        """
        self._folder, self._seen_as, self._source, self._mtp = folder, seen_as, source, mtp

    def send(self, shipment: Shipment) -> int:
        """See Transport. A folder that could not be written whole is removed: the disk may be full.

        Raises TimeoutError where writing has used up the deadline: then no server is asked, and none is to blame.
        """
        check, export = partial(self._check, shipment.deadline), shipment.export
        if shipment.policy.parallel.is_stage_leader:
            export = _watched(export, check)
        try:
            sent = save_hf(
                shipment.policy,
                self._source,
                str(self._folder),
                mtp=self._mtp,
                export=export,
                gather=shipment.gather,
            )
        except OSError:
            if dist.get_rank() == 0:
                shutil.rmtree(partial_of(self._folder), ignore_errors=True)
            raise
        if dist.get_rank() == 0:
            check()
            payload: dict[str, object] = {"model_path": self._seen_as, "flush_cache": False}
            payloads = dict.fromkeys(shipment.urls, payload)
            replies = post_all("update_weights_from_disk", payloads, shipment.deadline.left_s())
            InFlight(self._folder, sent, replies).wait(shipment.deadline)
        return sent

    def settle(self, *, verified: bool) -> None:
        """Nothing is built on the folder."""

    def close(self) -> None:
        """Nothing is held between syncs."""

    def _check(self, deadline: Deadline) -> None:
        if deadline.is_over():
            raise TimeoutError(
                f"writing {self._folder} took longer than weight_sync.deadline_s={deadline.seconds:g} s; raise it, "
                "or set weight_sync.disk_path to a faster disk"
            )


def _watched(export: StageExport, check: Callable[[], None]) -> StageExport:
    """`export` with `check` before every tensor. After its error the rest is gathered and not written."""

    def watch(name: str, tensor: Tensor) -> None:
        check()
        if export.watch is not None:
            export.watch(name, tensor)

    return replace(export, watch=watch)
