"""Write a model as a Hugging Face directory: one tensor in memory at a time, whole or not there."""

from __future__ import annotations

import shutil
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from megatron_rpp.device import dtype_name
from megatron_rpp.model.build import Model
from megatron_rpp.model.export_hf import empty_hf_tensors, entries_of, hf_tensors, takes_part_in_export
from megatron_rpp.model.hf_io.model_files import copy_model_files
from megatron_rpp.model.hf_io.safetensors_writer import Entry, name_files, split_entries, write_file, write_index
from megatron_rpp.model.hf_io.tensors import HFTensors
from megatron_rpp.model.mtp_export import mtp_changes, with_mtp_layers
from megatron_rpp.parallel.collectives import gather_errors, gather_objects, on_rank_0

FILE_BYTES = 4_000_000_000
Files = list[tuple[str, list[Entry]]]


def save_hf(model: Model, source: str, out: str, *, mtp: str = "keep", include_code: bool = False) -> None:
    """Write the whole model to `out`; config and tokenizer come from `source`.

    mtp: `keep` or `drop` the multi-token prediction layers of `source`, which training does not change.
    include_code: also copy the Python files of `source`.

    A collective over the whole job. Each stage of the first replica writes its own safetensors files; the
    directory appears under its final name only when it is complete.

    Raises OSError on every rank if any rank could not write.
    """
    final = Path(out)
    partial = final.with_name(final.name + ".partial")
    on_rank_0(lambda: make_empty(partial))
    files, own = _plan(model, source, mtp)
    _write(model, source, mtp, partial, own)

    def finish() -> None:
        write_index(partial, files)
        dtype = dtype_name(model.config.params_dtype)
        changes = mtp_changes(source, [entry.name for _, entries in files for entry in entries])
        copy_model_files(Path(source), partial, dtype=dtype, include_code=include_code, changes=changes)
        replace_directory(partial, final)

    on_rank_0(finish, expect=(OSError, ValueError))


def _plan(model: Model, source: str, mtp: str) -> tuple[Files, Files]:
    """(every file of the directory with its tensors, those that this rank writes)."""
    runs: list[list[Entry]] = []
    error = None
    if _is_writer(model):
        try:
            stage = empty_hf_tensors(model)
            tensors = with_mtp_layers(source, mtp, stage, model.parallel.is_last_stage, read=_empty)
            runs = split_entries(entries_of(tensors), FILE_BYTES)
        except (OSError, ValueError) as caught:
            error = str(caught)
    if failed := gather_errors(error):
        raise OSError(failed)
    of_ranks = gather_objects(runs)
    files = name_files([run for rank in of_ranks for run in rank])
    first = sum(len(rank) for rank in of_ranks[: model.parallel.rank])
    return files, files[first : first + len(runs)]


def _write(model: Model, source: str, mtp: str, folder: Path, own: Files) -> None:
    """Write this rank's files. After an error the gathers still run to their end, so that no rank waits."""
    error = None
    if takes_part_in_export(model):
        gathered = hf_tensors(model)
        if _is_writer(model):
            tensors = with_mtp_layers(source, mtp, gathered, model.parallel.is_last_stage)
            try:
                for name, entries in own:
                    write_file(folder / name, entries, tensors)
            except (OSError, ValueError) as caught:
                error = str(caught)
        deque(gathered, maxlen=0)
    if failed := gather_errors(error):
        raise OSError(failed)


def _empty(files: HFTensors, name: str) -> Tensor:
    return torch.empty(files.shape(name), dtype=files.dtype(name), device="meta")


def _is_writer(model: Model) -> bool:
    return model.parallel.dp_rank == 0 and model.parallel.tp_rank == 0


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
