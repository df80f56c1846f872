"""How the weights are divided: parameters into boxes, boxes into files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_rpp.conversion.pieces import Piece
from megatron_rpp.conversion.skeleton import Skeleton, Slot

BOX_ELEMENTS = 1 << 25  # 64 MiB in bfloat16: readers hold a whole box beside what they make of it
DtypeOf = Callable[[Slot], torch.dtype]


@dataclass(frozen=True)
class Box:
    """One stored chunk: which slot it is of, and its number among the slot's boxes."""

    slot: Slot
    number: int
    item: WriteItem
    nbytes: int


def boxes_of(slot: Slot, value: torch.Tensor, tensor_parallel: int) -> list[Piece]:
    """The parameter `value` [slot.shape] cut as ranks of this tensor-parallel size hold it, and large boxes again.

    Experts stay whole, as at the default parallel.expert_tensor of 1.
    """
    count = 1 if slot.is_expert else tensor_parallel
    shards = [shard for piece in slot.pieces(value) for shard in piece.cut(slot.dim, count)]
    return [box for shard in shards for box in shard.cut(0, max(1, -(-shard.value.numel() // BOX_ELEMENTS)))]


def plan_boxes(skeleton: Skeleton, tensor_parallel: int, dtype_of: DtypeOf) -> list[Box]:
    """Every box of the model, in its order."""
    return [
        _box(slot, number, piece, dtype_of(slot))
        for slot in skeleton.slots
        for number, piece in enumerate(boxes_of(slot, slot.empty, tensor_parallel))
    ]


def plan_files(boxes: list[Box], objects: list[str], max_bytes: int) -> list[SavePlan]:
    """A plan for each file: boxes up to `max_bytes`, or one larger box. The first also has the `objects`."""
    plans = [SavePlan([_object_item(key) for key in objects])]
    for run in _runs(boxes, max_bytes):
        plans.append(SavePlan([box.item for box in run]))
    return plans if objects else plans[1:]


def _runs(boxes: list[Box], max_bytes: int) -> Iterator[list[Box]]:
    run: list[Box] = []
    held = 0
    for box in boxes:
        if run and held + box.nbytes > max_bytes:
            yield run
            run, held = [], 0
        run.append(box)
        held += box.nbytes
    if run:
        yield run


def _box(slot: Slot, number: int, piece: Piece, dtype: torch.dtype) -> Box:
    offsets = torch.Size(piece.offsets)
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets, piece.sizes),
        properties=TensorProperties(dtype=dtype),
        size=torch.Size(piece.global_shape),
    )
    item = WriteItem(MetadataIndex(piece.key, offsets), WriteItemType.SHARD, tensor_data=data)
    return Box(slot, number, item, piece.sizes.numel() * dtype.itemsize)


def _object_item(key: str) -> WriteItem:
    return WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO)
