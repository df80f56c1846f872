"""Hugging Face directory -> Megatron distributed checkpoint, in one process and one parameter at a time."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.conversion.layout import plan_boxes, plan_files
from megatron_rpp.conversion.mapped import copied
from megatron_rpp.conversion.megatron_writer import write_megatron
from megatron_rpp.conversion.progress import Progress
from megatron_rpp.conversion.skeleton import Skeleton, Slot, build_skeleton
from megatron_rpp.conversion.sources import require_complete
from megatron_rpp.conversion.tokenizer_size import require_tokenizer_fits
from megatron_rpp.conversion.workspace import fingerprint, open_workspace, require_absent, require_disk
from megatron_rpp.device import dtype_name
from megatron_rpp.model.checks import check_split
from megatron_rpp.model.hf_io.model_files import copied_bytes, copy_model_files
from megatron_rpp.model.hf_io.tensors import HFTensors
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.model.hf_mapping.mtp import stored_mtp, without_mtp
from megatron_rpp.model.load_hf import require_tied
from megatron_rpp.model.load_megatron import is_megatron_directory
from megatron_rpp.model.mtp_export import told_mtp

SPARE_BYTES = 1 << 20  # indices
ENTRY_BYTES = 1536  # of a zip archive around a tensor or an object


@dataclass(frozen=True)
class ToMegatron:
    """What is asked for."""

    source: str
    out: str
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    dtype: str | None = None  # float32 or bfloat16; None: as stored
    mtp: str = "keep"  # or "drop" multi-token prediction layers
    allow_pickle: bool = False  # read pytorch_model.bin where there are no safetensors
    file_bytes: int = 1 << 28  # of weights in one file: what a kill costs

    @property
    def layout(self) -> ParallelConfig:
        """A job that these sizes are of; sequence parallelism and data ranks cut no weights."""
        return ParallelConfig(
            tensor=self.tensor,
            sequence=self.tensor > 1,
            pipeline=self.pipeline,
            expert=self.expert,
            data=self.expert,
        )


def convert_to_megatron(asked: ToMegatron) -> None:
    """Write `asked.out`. Everything that headers can tell is checked before anything is written.

    Raises ValueError or OSError, which name file and tensor; then nothing is left.
    """
    source, out = Path(asked.source), Path(asked.out)
    require_absent(out)
    if is_megatron_directory(source):
        raise ValueError(f"--hf={source} is a Megatron directory already; megatron_to_hf converts it back")
    hf = read_hf_config(asked.source, "--hf")
    check_split(asked.layout, hf)
    require_tokenizer_fits(source, hf.vocab_size)
    dtype: torch.dtype | None = getattr(torch, asked.dtype) if asked.dtype else None
    tensors = HFTensors(asked.source, allow_pickle=asked.allow_pickle, dequantized_dtype=dtype or torch.bfloat16)
    hf = stored_mtp(hf, tensors.names)
    skeleton = build_skeleton(hf if asked.mtp == "keep" else without_mtp(hf))
    require_complete(tensors, skeleton, hf)
    require_tied(tensors, hf)
    dtypes = _dtypes(tensors, skeleton, dtype)
    boxes = plan_boxes(skeleton, asked.tensor, lambda slot: dtypes[slot.keys[0]])
    total = sum(box.nbytes for box in boxes)
    entries = len(boxes) + len(skeleton.objects)
    require_disk(out, total + entries * ENTRY_BYTES + copied_bytes(source) + SPARE_BYTES)
    # What cuts nothing, or is told by the source's files, is no part of it.
    options = {name: value for name, value in asdict(asked).items() if name in ("tensor", "dtype", "mtp", "file_bytes")}
    key = fingerprint(source, {"to": "megatron", **options})

    def read(slot: Slot) -> Tensor:
        stored = [tensors.read(name) for name in slot.hf_names]
        value = slot.value([part.to(dtypes[slot.keys[0]]) for part in stored])
        is_file = any(value.data_ptr() == part.data_ptr() for part in stored)
        return copied(value) if is_file else value

    with open_workspace(out, key) as workspace:
        progress = Progress("hf_to_megatron", total, min(workspace.done_bytes, total))
        plans = plan_files(boxes, skeleton.objects, asked.file_bytes)
        write_megatron(workspace, plans, boxes, asked.tensor, read, progress, save_id=key)
        name = dtype_name(_most_common(skeleton, dtypes))
        changes = told_mtp(asked.source, skeleton.hf.num_mtp_layers)
        copy_model_files(source, workspace.folder, dtype=name, changes=changes)
        progress.finish()


def _dtypes(tensors: HFTensors, skeleton: Skeleton, asked: torch.dtype | None) -> dict[str, torch.dtype]:
    """By Megatron key: one dtype each, as the format wants it; the widest where layers differ."""
    dtypes: dict[str, torch.dtype] = {}
    for slot in skeleton.slots:
        stored = (
            asked if asked and not slot.rule.keeps_dtype else _widest([tensors.dtype(name) for name in slot.hf_names])
        )
        for key in slot.keys:
            dtypes[key] = torch.promote_types(dtypes.get(key, stored), stored)
    return dtypes


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest


def _most_common(skeleton: Skeleton, dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """By bytes: what config.json calls the model's dtype."""
    held: dict[torch.dtype, int] = {}
    for slot in skeleton.slots:
        dtype = dtypes[slot.keys[0]]
        held[dtype] = held.get(dtype, 0) + math.prod(slot.shape)
    return max(held, key=lambda dtype: held[dtype])
