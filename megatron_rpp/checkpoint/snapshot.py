"""What a checkpoint holds of model and optimizer, taken at one moment and written at another.

Megatron's own background save forks the trainer, which here holds threads of gloo, HTTP and the watchdog, and it
starts a manager process that outlives a rank that is killed; newer releases leave it to another package. So what
Megatron would write goes through torch's writer, in a thread: no process is left behind, and every release and
device takes the same path. This file has all that is Megatron's in it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_rpp.model.fp8_params import plain


@dataclass(frozen=True)
class Snapshot:
    """One rank's part."""

    tensors: dict[str, Any]  # as torch's writer takes them; each on one rank only
    common: bytes  # what is no tensor, packed; the same on every rank


def take_snapshot(sharded: dict[str, Any], *, copy: bool) -> Snapshot:
    """Of a Megatron sharded state dict, which is used up. A collective over the whole job.

    copy: into host memory, so that training may go on; otherwise the parameters must stand still until it is written.
    """
    sharded, common = save_preprocess(sharded, True)
    parts, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    for part in (part for group in parts.values() for part in group if isinstance(part, ShardedTensor)):
        part.data = plain(part.data)  # FP8 bytes could be read by no other recipe or layout
        if copy:
            part.data = part.data.to("cpu", copy=True)
    packed = io.BytesIO()
    torch.save(common, packed)
    return Snapshot(mcore_to_pyt_state_dict(parts, False), packed.getvalue())


def write_snapshot(snapshot: Snapshot, folder: Path, group: ProcessGroup) -> None:
    """Write Megatron's `torch_dist` format, a file a rank and torch's index; `write_common` adds what is missing.

    A collective over `group`, all ranks of the job, and over nothing else, so that it may run in a thread. Raises
    OSError, with the file, on every rank where one could not write.
    """
    # One thread: torch loses the errors of further ones. Nothing is copied ahead: that would use another GPU's stream.
    writer = dcp.FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0)
    writer.fs = _NamedFiles()
    planner = MCoreSavePlanner(flatten_state_dict=False)
    try:
        dcp.save(snapshot.tensors, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank}: {_first_line(cause)}") from error


def write_common(snapshot: Snapshot, folder: Path) -> None:
    """Megatron's two small files, of one rank."""
    (folder / COMMON_STATE_FNAME).write_bytes(snapshot.common)
    save_config(CheckpointingConfig("torch_dist"), str(folder))


def written_by(rank: int, folder: Path) -> list[str]:
    """Names of the files of `folder` that `rank` has written with `write_snapshot`, but for the index."""
    return [path.name for path in folder.glob(f"__{rank}_*.distcp")]


class _NamedFiles(FileSystem):
    """Says which file could not be written; torch turns an OSError into a RuntimeError without a name."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        try:
            with super().create_stream(path, mode) as stream:
                yield stream
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__ or error
            reason = cause.strerror if isinstance(cause, OSError) else _first_line(cause)
            raise OSError(f"{path}: {reason}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
