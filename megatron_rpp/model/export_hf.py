"""A model's shards back to Hugging Face tensors: an iterator for weight sync, a directory for everyone else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_rpp.model.build import Model
from megatron_rpp.model.hf_mapping import family_of
from megatron_rpp.model.shards import ShardedParameter, sharded_parameters
from megatron_rpp.parallel.collectives import gather_errors, gather_objects, gather_shards, on_rank_0

_COPIED = ("*.json", "*.model", "*.txt", "*.jinja")  # config and tokenizer files


def hf_tensors(
    model: Model, value_of: Callable[[ShardedParameter], Tensor] = lambda item: item.parameter.detach()
) -> Iterator[tuple[str, Tensor]]:
    """This pipeline stage's tensors under their Hugging Face names, whole.

    A collective over the TP group: every TP rank must run the iterator to its end, and each gets every
    tensor. `value_of` picks what is exported of a parameter (its gradient, say), shaped like it.
    """
    family = family_of(model.hf)
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

    Raises OSError on every rank if any rank could not write.
    """
    final = Path(out)
    partial = final.with_name(final.name + ".partial")
    on_rank_0(lambda: make_empty(partial))
    files = _write_shards(model, partial)
    on_rank_0(lambda: _finish(model, Path(source), partial, final, files))


def _write_shards(model: Model, folder: Path) -> list[tuple[str, list[str]]]:
    """Write this stage's file; every rank's (file, tensor names)."""
    parallel, names, error = model.parallel, [], None
    file_name = f"model-{parallel.pp_rank + 1:05d}-of-{parallel.pp_size:05d}.safetensors"
    if parallel.dp_rank == 0:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in hf_tensors(model)}
        if parallel.tp_rank == 0:
            try:
                save_file(tensors, str(folder / file_name), metadata={"format": "pt"})
                names = list(tensors)
            except (OSError, SafetensorError) as caught:
                error = f"{folder / file_name}: {caught}"
    if failed := gather_errors(error):
        raise OSError(failed)
    return gather_objects((file_name, names))


def make_empty(folder: Path) -> None:
    """Make `folder` anew, with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(model: Model, source: Path, partial: Path, final: Path, files: list[tuple[str, list[str]]]) -> None:
    """Index, config and tokenizer; then the final name. An older directory of that name goes last."""
    weight_map = {name: file_name for file_name, names in files for name in names}
    (partial / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1)
    )
    for path in (path for pattern in _COPIED for path in source.glob(pattern)):
        if not path.name.endswith(".index.json"):
            shutil.copy(path, partial)
    config = json.loads((source / "config.json").read_text())
    config["dtype" if "dtype" in config else "torch_dtype"] = str(model.config.params_dtype).removeprefix("torch.")
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)
