"""Load a Megatron distributed checkpoint (`torch_dist`) into this rank's shards, at any layout."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import CheckpointingException, ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_rpp.model.fp8_params import fill, is_fp8
from megatron_rpp.parallel.collectives import gather_errors

_BACKEND, _INDEX = "metadata.json", ".metadata"  # Megatron's file and torch's
_DCP = "torch.distributed.checkpoint"
_PICKLED = {  # by module: what an index is made of, as of torch 2.4 to 2.13 and Megatron-Core 0.9 to 0.16
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    f"{_DCP}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.filesystem": {"_StorageInfo"},
    f"{_DCP}.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
}


def is_megatron_directory(path: str | Path) -> bool:
    """Whether `path` holds a Megatron distributed checkpoint."""
    return (Path(path) / _BACKEND).is_file() and (Path(path) / _INDEX).is_file()


def load_megatron_weights(chunks: Sequence[torch.nn.Module], path: str | Path) -> None:
    """Fill every parameter of `chunks` from the checkpoint `path`, written at any layout. A collective of the job.

    Values are cast to each parameter's dtype; rows of vocabulary padding become zero. `_extra_state` (FP8
    scales of Transformer Engine) is not read: it starts afresh.

    Raises ValueError on every rank where a file is missing or damaged, or a tensor is missing or of another shape.
    """
    models: list[Any] = [getattr(chunk, "module", chunk) for chunk in chunks]
    state: dict[str, Any] = {f"model{i}": model.sharded_state_dict() for i, model in enumerate(models)}
    _, state = extract_matching_values(state, lambda value: isinstance(value, ShardedObject))
    error = None
    try:
        _require_tensors(state, read_metadata(path), path)
    except ValueError as caught:
        error = str(caught)
    if failed := gather_errors(error):
        raise ValueError(failed)
    force_all_tensors_to_non_fp8(state)  # from 0.19 on Megatron would else quantize what it reads
    try:
        loaded = dist_checkpointing.load(state, str(path))
    # CheckpointException is a BaseException of torch that carries every rank's error.
    except (CheckpointException, CheckpointingException, RuntimeError, OSError, KeyError) as caught:
        raise ValueError(f"{path} cannot be loaded: {_reason(caught)}; convert or copy it again") from caught
    for i, model in enumerate(models):
        found = loaded[f"model{i}"]
        for name, parameter in model.named_parameters():
            if is_fp8(parameter) and name in found:  # `load_state_dict` sees to all others
                fill(parameter, found.pop(name))
        missing, unexpected = model.load_state_dict(found, strict=False)
        lost = [name for name in missing if not name.endswith("_extra_state") and not is_fp8(model.get_parameter(name))]
        assert not lost and not unexpected, f"sharded_state_dict gave no {lost}, and too much: {unexpected}"


def read_metadata(path: str | Path) -> Metadata:
    """torch's index of the checkpoint `path`, checked against the files; runs no code of a foreign pickle.

    Raises ValueError where it is no `torch_dist` checkpoint, is damaged, or where a file is missing or cut off.
    """
    folder = Path(path)
    if not is_megatron_directory(folder):
        raise ValueError(f"{path} is no Megatron checkpoint: it lacks {_BACKEND} or {_INDEX}")
    try:
        backend = json.loads((folder / _BACKEND).read_text(encoding="utf-8"))["sharded_backend"]
        with (folder / _INDEX).open("rb") as file:
            metadata = _Unpickler(file).load()
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, IndexError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: {_BACKEND} or {_INDEX} is damaged: {error}; convert or copy it again") from error
    if backend != "torch_dist" or not isinstance(metadata, Metadata):
        raise ValueError(f"{path} is stored as {backend}; only torch_dist is read, Megatron's default")
    _require_files(folder, metadata)
    return metadata


class _Unpickler(pickle.Unpickler):
    """Only the classes that torch's and Megatron's own indices are made of."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _PICKLED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint index needs")


def _require_files(folder: Path, metadata: Metadata) -> None:
    ends: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        if Path(name).name != name:
            raise ValueError(f"{folder / _INDEX} names {name}; only files in the same directory are read")
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing; {_INDEX} names it")
        if (size := file.stat().st_size) < end:
            raise ValueError(f"{file} is cut off at {size} of {end} bytes; convert or copy it again")


def _require_tensors(state: dict[str, Any], metadata: Metadata, path: str | Path) -> None:
    wanted, _, _ = load_preprocess(state)
    for tensor in nested_values(wanted):
        if not isinstance(tensor, ShardedTensor):
            continue
        stored = metadata.state_dict_metadata.get(tensor.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise ValueError(f"{path} lacks the tensor {tensor.key}, which its config.json implies")
        if not tensor.allow_shape_mismatch and tuple(stored.size) != tuple(tensor.global_shape):
            raise ValueError(
                f"{path}: {tensor.key} has the shape {tuple(stored.size)} where its config.json implies "
                f"{tuple(tensor.global_shape)}"
            )


def _reason(error: BaseException) -> str:
    """One line: of the first rank that failed, where torch has gathered them."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).splitlines() or [type(error).__name__])[0]
