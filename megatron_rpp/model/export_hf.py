"""A model's shards back to Hugging Face tensors: an iterator for weight sync, a directory for everyone else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_rpp.model.build import Model
from megatron_rpp.model.hf_mapping import find_family
from megatron_rpp.model.shards import ShardedParameter, sharded_parameters
from megatron_rpp.parallel.collectives import gather_objects, gather_shards

_COPIED = ("*.json", "*.model", "*.txt", "*.jinja")  # config and tokenizer files
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def hf_tensors(
    model: Model, value_of: Callable[[ShardedParameter], Tensor] = lambda item: item.parameter.detach()
) -> Iterator[tuple[str, Tensor]]:
    """This pipeline stage's tensors under their Hugging Face names, whole.

    A collective over the TP group: every TP rank must run the iterator to its end, and each gets every
    tensor. `value_of` picks what is exported of a parameter (its gradient, say), shaped like it.
    """
    family = find_family(model.hf.architecture)
    for item in sharded_parameters(model.chunks):
        if item.is_tied_copy:
            continue  # the first stage exports the embedding
        rule, names = family.find(item.name)
        local = value_of(item)
        shards = [local] if item.dim is None else gather_shards(local, model.parallel.tp_group)
        yield from zip(names, rule.transform.merge(shards, item.dim, model.hf), strict=True)


def save_hf(model: Model, source: str, out: str) -> None:
    """Write the whole model as a Hugging Face directory; config and tokenizer come from `source`.

    A collective over the whole job. Each stage of the first replica writes one safetensors file; the
    directory appears under its final name only when it is complete.
    """
    parallel, final = model.parallel, Path(out)
    partial = final.with_name(final.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    sizes: dict[str, int] = {}
    file_name = f"model-{parallel.pp_rank + 1:05d}-of-{parallel.pp_size:05d}.safetensors"
    if parallel.dp_rank == 0:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in hf_tensors(model)}
        if parallel.tp_rank == 0:
            save_file(tensors, str(partial / file_name), metadata={"format": "pt"})
            sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    files = gather_objects((file_name, sizes))
    if dist.get_rank() == 0:
        _write_index(partial, files)
        _copy_side_files(Path(source), partial, model.hf.tied_embeddings, model.config.params_dtype)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    dist.barrier()


def _write_index(folder: Path, files: list[tuple[str, dict[str, int]]]) -> None:
    weight_map = {name: file_name for file_name, sizes in files for name in sizes}
    total = sum(size for _, sizes in files for size in sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _copy_side_files(source: Path, out: Path, tied: bool, dtype: torch.dtype) -> None:
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if path.name not in _WEIGHTS:
                shutil.copy(path, out)
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = tied
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2))
