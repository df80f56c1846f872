"""Megatron distributed checkpoint -> Hugging Face directory, in one process and one parameter at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_rpp.conversion.hf_stream import HFStream
from megatron_rpp.conversion.megatron_reader import MegatronTensors
from megatron_rpp.conversion.progress import Progress
from megatron_rpp.conversion.skeleton import build_skeleton
from megatron_rpp.conversion.sources import MegatronSource
from megatron_rpp.conversion.tokenizer_size import require_tokenizer_fits
from megatron_rpp.conversion.workspace import Workspace, fingerprint, open_workspace, require_absent, require_disk
from megatron_rpp.device import dtype_name
from megatron_rpp.model.hf_io.fp8_blocks import quantization_config
from megatron_rpp.model.hf_io.model_files import copied_bytes, copy_model_files
from megatron_rpp.model.hf_io.safetensors_writer import plan_files, write_file, write_index
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.model.hf_mapping.mtp import MEGATRON_KEY, stored_mtp, without_mtp
from megatron_rpp.model.load_megatron import is_megatron_directory
from megatron_rpp.model.mtp_export import told_mtp

SPARE_BYTES = 1 << 20  # headers and index
ENTRY_BYTES = 512  # of a header and the index, a tensor


@dataclass(frozen=True)
class ToHF:
    """What is asked for."""

    source: str
    out: str
    hf: str | None = None  # where config and tokenizer are, if not in `source`
    dtype: str | None = None  # float32 or bfloat16; None: as stored
    fp8: bool = False
    mtp: str = "keep"  # or "drop" multi-token prediction layers
    file_bytes: int = 4_000_000_000  # of one safetensors file


def convert_to_hf(asked: ToHF) -> None:
    """Write `asked.out`, which transformers loads as it stands.

    Raises ValueError or OSError, which name file and tensor; then nothing is left.
    """
    source, out, config_from = Path(asked.source), Path(asked.out), _config_from(asked)
    require_absent(out)
    hf = read_hf_config(str(config_from), "--hf" if asked.hf else "--megatron")
    require_tokenizer_fits(config_from, hf.vocab_size)
    dtype = getattr(torch, asked.dtype) if asked.dtype else None
    stored = MegatronTensors(source)
    hf = stored_mtp(hf, stored.tensors) if asked.mtp == "keep" else without_mtp(hf)
    ignored = None if asked.mtp == "keep" else MEGATRON_KEY
    stream = HFStream(MegatronSource(stored, build_skeleton(hf), ignored=ignored), dtype, asked.fp8)
    files = plan_files(stream.entries, asked.file_bytes)
    total = sum(entry.nbytes for entry in stream.entries)
    require_disk(out, total + len(stream.entries) * ENTRY_BYTES + copied_bytes(config_from) + SPARE_BYTES)
    options = {name: value for name, value in asdict(asked).items() if name in ("dtype", "fp8", "mtp", "file_bytes")}
    key = fingerprint(source, {"to": "hf", "config": fingerprint(config_from, {}), **options})
    with open_workspace(out, key) as workspace:
        progress = Progress("megatron_to_hf", total, min(workspace.done_bytes, total))
        _write_files(workspace, stream, files, progress)
        write_index(workspace.folder, files)
        quantization = quantization_config() if asked.fp8 else None
        dtype = dtype_name(stream.main_dtype)
        changes = told_mtp(str(config_from), hf.num_mtp_layers)
        copy_model_files(config_from, workspace.folder, dtype=dtype, quantization=quantization, changes=changes)
        progress.finish()


def _write_files(workspace: Workspace, stream: HFStream, files: list, progress: Progress) -> None:
    for file, entries in files:
        if file not in workspace.done:
            write_file(workspace.folder / file, entries, stream.tensors(entries), progress)
            workspace.note(file, None)


def _config_from(asked: ToHF) -> Path:
    """The directory of config.json and tokenizer. ValueError where none is named or found."""
    if not is_megatron_directory(asked.source):
        raise ValueError(f"--megatron={asked.source} is no Megatron checkpoint: it lacks metadata.json or .metadata")
    folder = Path(asked.hf or asked.source)
    if not (folder / "config.json").is_file():
        if asked.hf:
            raise ValueError(f"--hf {asked.hf} must be a Hugging Face directory; it holds no config.json")
        raise ValueError(
            f"{asked.source} holds no config.json; pass --hf DIR, the Hugging Face directory that the run started from"
        )
    return folder
