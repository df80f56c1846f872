"""Write Megatron's `torch_dist` format through torch's own writer, one parameter in memory at a time."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_rpp.conversion.layout import Box, boxes_of
from megatron_rpp.conversion.pieces import Piece
from megatron_rpp.conversion.skeleton import Slot
from megatron_rpp.conversion.workspace import Workspace
from megatron_rpp.model.hf_io.chunked_file import ChunkedFile

ReadSlot = Callable[[Slot], Tensor]
_SUFFIX = "0.distcp"  # of the only file of each plan; torch puts `__<plan>_` before it


def write_megatron(
    workspace: Workspace,
    plans: list[SavePlan],
    boxes: list[Box],
    tensor_parallel: int,
    read: ReadSlot,
    progress: Callable[[int], None],
    save_id: str,
) -> None:
    """Write every plan's file that is not yet there, then the index. `read` gives a whole parameter in its dtype,
    in memory that is then this function's.

    Raises OSError or ValueError that names the file.
    """
    planner = _Streaming(boxes, tensor_parallel, read, progress)
    # Not the planner's own method, which compares every two chunks of a tensor: hours for thousands of experts.
    plans, metadata = create_default_global_save_plan(plans)
    # per_thread_copy_ahead=0: tensors are asked for one at a time, in order, also where there is a GPU.
    writer = FileSystemWriter(workspace.folder, thread_count=1, per_thread_copy_ahead=0)
    writer.fs = _Files()
    writer.save_id = save_id  # a random one would tell a continued conversion from an undisturbed one
    results = []
    with _without_checksums():
        for plan in writer.prepare_global_plan(plans):
            results.append(_write_plan(workspace, writer, planner, plan))
    writer.finish(metadata, results)
    with (workspace.folder / COMMON_STATE_FNAME).open("wb") as file:
        torch.save({}, file)  # what ranks have in common besides tensors: nothing
    save_config(CheckpointingConfig("torch_dist"), str(workspace.folder))


def _write_plan(
    workspace: Workspace, writer: FileSystemWriter, planner: _Streaming, plan: SavePlan
) -> list[WriteResult]:
    file = f"{plan.storage_data.prefix}{_SUFFIX}"
    if file not in workspace.done:
        try:
            results: list[WriteResult] = writer.write_data(plan, planner).wait()
        except (OSError, RuntimeError) as error:  # torch.save turns what the stream raises into a RuntimeError
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            cause = error if isinstance(error, OSError) else error.__context__ or error
            reason = (
                cause.strerror if isinstance(cause, OSError) else (str(cause).splitlines() or [type(cause).__name__])[0]
            )
            raise OSError(f"{workspace.folder / file}: cannot write {planner.current}: {reason}") from error
        finally:
            planner.release()
        workspace.note(file, [_stored(result) for result in results])
    return [_result(file, *stored) for stored in workspace.done[file]]


class _Files(FileSystem):
    """Hands torch's writer files that are written in pieces."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with ChunkedFile(path, mode) as stream:
            yield stream


class _Streaming(DefaultSavePlanner):
    """Gives torch's writer each box when it is about to write it."""

    def __init__(self, boxes: list[Box], parallel: int, read: ReadSlot, progress: Callable[[int], None]) -> None:
        super().__init__(flatten_state_dict=False)
        self._boxes = {(box.item.index.fqn, box.item.index.offset): box for box in boxes}
        self._parallel, self._read, self._progress = parallel, read, progress
        self._slot: Slot | None = None
        self._pieces: list[Piece] = []
        self._given: Tensor | None = None
        self.current = ""  # what is being written, for errors

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        self.release_given()
        if write_item.type == WriteItemType.BYTE_IO:
            self.current = write_item.index.fqn
            return io.BytesIO(_no_object())
        box = self._boxes[write_item.index.fqn, write_item.index.offset]
        self.current = box.slot.name
        if self._slot is not box.slot:
            self.release()
            self._slot, self._pieces = box.slot, boxes_of(box.slot, self._read(box.slot), self._parallel)
        piece = self._pieces[box.number]
        whole = len(self._pieces) == 1 and piece.value.is_contiguous()
        value = piece.value if whole else piece.value.clone(memory_format=torch.contiguous_format)
        self._given = value.view(piece.sizes)
        self._progress(box.nbytes)
        return self._given

    def release_given(self) -> None:
        """torch's writer keeps the tensors of a file until it is closed; what is written needs no memory."""
        if self._given is not None:
            self._given.untyped_storage().resize_(0)
            self._given = None

    def release(self) -> None:
        """Forget the parameter in hand."""
        self.release_given()
        self._slot, self._pieces = None, []  # before the next is read


@cache
def _no_object() -> bytes:
    """What Megatron saves for an `_extra_state` that is None: a list of one rank's."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return buffer.getvalue()


def _stored(result: WriteResult) -> list[Any]:
    """As JSON; `_result` undoes it."""
    index, info = result.index, result.storage_data
    offset = None if index.offset is None else list(index.offset)
    return [index.fqn, offset, index.index, info.offset, info.length, result.size_in_bytes]


def _result(file: str, fqn: str, at: list[int] | None, number: int | None, start: int, length: int, size: int) -> Any:
    index = MetadataIndex(fqn, None if at is None else torch.Size(at), number)
    return WriteResult(index, size, _StorageInfo(file, start, length))


@contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.save spends half of its time on CRC-32 sums that torch.load never checks."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
