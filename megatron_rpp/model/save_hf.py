"""Write a model as a Hugging Face directory: one tensor in memory at a time, whole or not there."""

from __future__ import annotations

import shutil
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rpp.device import dtype_name
from megatron_rpp.model.build import Model
from megatron_rpp.model.export_hf import entries_of, takes_part_in_export
from megatron_rpp.model.hf_io.fp8_blocks import quantization_config
from megatron_rpp.model.hf_io.model_files import copy_model_files
from megatron_rpp.model.hf_io.safetensors_writer import Entry, name_files, split_entries, write_file, write_index
from megatron_rpp.model.hf_io.tensors import HFTensors
from megatron_rpp.model.mtp_export import mtp_changes, open_mtp, with_mtp_layers
from megatron_rpp.model.stage_export import StageExport
from megatron_rpp.parallel.collectives import Gather, gather_errors, gather_objects, on_rank_0, words_of

FILE_BYTES = 4_000_000_000
Files = list[tuple[str, list[Entry]]]


def save_hf(
    model: Model,
    source: str,
    out: str,
    *,
    mtp: str = "keep",
    include_code: bool = False,
    export: StageExport | None = None,
    gather: Gather = gather_objects,
) -> int:
    """Write the whole model to `out`; config and tokenizer come from `source`. Returns the bytes of this rank's files.

    mtp: `keep` or `drop` the multi-token prediction layers of `source`, which training does not change.
    include_code: also copy the Python files of `source`. export: of `model`; None: as it is. gather: how the
    ranks tell each other what they plan and what went wrong.

    A collective over the whole job. Each stage of the first replica writes its own safetensors files; the
    directory appears under its final name only when it is complete.

    Raises OSError on every rank if any rank could not write.
    """
    final = Path(out)
    partial = partial_of(final)
    export = export or StageExport(model)
    on_rank_0(lambda: make_empty(partial), expect=Exception, gather=gather)
    plan = _plan(export, source, mtp, gather)
    _write(export, source, partial, plan, gather)

    def finish() -> None:
        write_index(partial, plan.files)
        changes = mtp_changes(source, [entry.name for _, entries in plan.files for entry in entries])
        dtype = dtype_name(export.main_dtype)
        quantization = quantization_config(export.bf16_layers) if export.is_fp8 else None
        copy_model_files(
            Path(source), partial, dtype=dtype, include_code=include_code, quantization=quantization, changes=changes
        )
        replace_directory(partial, final)

    on_rank_0(finish, expect=Exception, gather=gather)
    return sum(entry.nbytes for _, entries in plan.own for entry in entries)


@dataclass(frozen=True)
class _Plan:
    files: Files  # every file of the directory with its tensors
    own: Files  # those that this rank writes
    mtp: HFTensors | None  # on a writer: where the MTP layers come from


def _plan(export: StageExport, source: str, mtp: str, gather: Gather) -> _Plan:
    runs: list[list[Entry]] = []
    files = error = None
    if export.model.parallel.is_stage_leader:
        try:
            files = open_mtp(source, mtp)
            is_last = export.model.parallel.is_last_stage
            tensors = with_mtp_layers(source, files, export.empty(), is_last, read=_empty)
            runs = split_entries(entries_of(tensors), FILE_BYTES)
        except Exception as caught:  # whatever it is: the other ranks wait to hear of it
            error = words_of(caught, OSError, ValueError)
    if failed := gather_errors(error, gather):
        raise OSError(failed)
    of_ranks = gather(runs)
    named = name_files([run for rank in of_ranks for run in rank])
    first = sum(len(rank) for rank in of_ranks[: export.model.parallel.rank])
    return _Plan(named, named[first : first + len(runs)], files)


def _write(export: StageExport, source: str, folder: Path, plan: _Plan, gather: Gather) -> None:
    """Write this rank's files. After an error the gathers still run to their end, so that no rank waits."""
    error = None
    if takes_part_in_export(export.model):
        gathered = export.tensors()
        if export.model.parallel.is_stage_leader:
            tensors = with_mtp_layers(source, plan.mtp, gathered, export.model.parallel.is_last_stage)
            try:
                for name, entries in plan.own:
                    write_file(folder / name, entries, tensors)
            except Exception as caught:
                error = words_of(caught, OSError, ValueError)
        try:
            deque(gathered, maxlen=0)
        except Exception as caught:
            error = error or words_of(caught, OSError, ValueError)
    if failed := gather_errors(error, gather):
        raise OSError(failed)


def _empty(files: HFTensors, name: str) -> Tensor:
    return torch.empty(files.shape(name), dtype=files.dtype(name), device="meta")


def partial_of(final: Path) -> Path:
    """Where the directory `final` is written until it is complete."""
    return final.with_name(final.name + ".partial")


def make_empty(folder: Path) -> None:
    """Make `folder` anew, with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def replace_directory(partial: Path, final: Path) -> None:
    """Give `partial` its final name. An older directory of that name goes last."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)
