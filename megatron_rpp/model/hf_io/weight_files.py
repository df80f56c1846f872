"""Which files of a Hugging Face directory hold its tensors, and whether each holds what it should."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from megatron_rpp.model.hf_io.pickles import PickleFile
from megatron_rpp.model.hf_io.safetensors_reader import SafetensorsFile, StoredTensor
from megatron_rpp.model.hf_io.safetensors_writer import INDEX_NAME, WHOLE_NAME

_PICKLE = "pytorch_model.bin"
_PICKLE_INDEX = "pytorch_model.bin.index.json"


class TensorFile(Protocol):
    """An open file of tensors."""

    @property
    def path(self) -> Path:
        """Where it is."""
        ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """What it holds, by name."""
        ...

    def read(self, name: str) -> Tensor:
        """One of them, whole and mapped."""
        ...


def open_tensors(folder: Path, allow_pickle: bool) -> dict[str, TensorFile]:
    """Each tensor's file. Safetensors come before pickles, and an index before a single file.

    Every file's header is read, so all that can be told without the data is told here. Raises ValueError,
    naming file and tensor, where there is no model, only pickles that are not allowed, an index that
    names a file elsewhere or missing, a damaged file, or a tensor that is missing or in two files.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory")
    for index, whole, kind in ((INDEX_NAME, WHOLE_NAME, SafetensorsFile), (_PICKLE_INDEX, _PICKLE, PickleFile)):
        found = index if (folder / index).exists() else whole
        if not (folder / found).exists():
            continue
        if kind is PickleFile and not allow_pickle:
            raise ValueError(
                f"{folder} holds pickles ({found}) and no {WHOLE_NAME}; save the model with safetensors, or pass "
                "--allow-pickle to read them as weights alone"
            )
        file_of = _read_index(folder / index) if found == index else {}
        opened: list[TensorFile] = [kind(folder / file) for file in sorted(set(file_of.values())) or [whole]]
        return _by_tensor(opened, file_of, folder / index)
    raise ValueError(f"{folder} holds no {WHOLE_NAME}; save the model with safetensors first")


def _by_tensor(files: list[TensorFile], indexed: dict[str, str], index: Path) -> dict[str, TensorFile]:
    by_tensor: dict[str, TensorFile] = {}
    for file in files:
        for name in file.tensors:
            if name in by_tensor:
                raise ValueError(f"{name} is in {by_tensor[name].path} and in {file.path}; remove one of them")
            by_tensor[name] = file
    for name, wanted in indexed.items():
        if name not in by_tensor or by_tensor[name].path.name != wanted:
            raise ValueError(
                f"{index.parent / wanted} lacks the tensor {name}, which {index.name} places there; download or "
                "save the model again"
            )
    return by_tensor


def _read_index(index: Path) -> dict[str, str]:
    """The file name of each tensor; every one lies in the index's own directory (a link may lead on)."""
    try:
        file_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if not file_of or not all(isinstance(file, str) for file in file_of.values()):
            raise TypeError("weight_map does not give tensors their files")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of a checkpoint: {error!r}; download or save it again") from error
    for file in sorted(set(file_of.values())):
        if Path(file).name != file:
            raise ValueError(f"{index} names {file}; only files in the same directory are read")
        if not (index.parent / file).is_file():
            raise ValueError(f"{index.parent / file} is missing; {index.name} names it")
    return file_of
