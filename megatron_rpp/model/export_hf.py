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
from megatron_rpp.model.mtp_export import count_mtp, mtp_tensors, tell_mtp
from megatron_rpp.model.shards import ShardedParameter, sharded_parameters
from megatron_rpp.parallel.collectives import gather_errors, gather_objects, gather_shards, on_rank_0

_COPIED = ("*.json", "*.model", "*.txt", "*.jinja")  # config and tokenizer files


def hf_tensors(
    model: Model, value_of: Callable[[ShardedParameter], Tensor | None] = lambda item: item.parameter.detach()
) -> Iterator[tuple[str, Tensor]]:
    """This pipeline stage's tensors under their Hugging Face names, whole.

    A collective over the TP group, and over the groups of experts where these are split: every rank that
    `takes_part_in_export` must run the iterator to its end, and each gets every tensor. Experts come one of
    each EP rank at a time. `value_of` picks what is exported of a parameter (its gradient, say), shaped like
    it; None leaves it out, on every rank.
    """
    family = family_of(model.hf)
    for item in sharded_parameters(model.chunks):
        local = None if item.is_tied_copy else value_of(item)  # the first stage exports a tied embedding
        if local is None:
            continue
        rule, names = family.find(item.name)
        group = model.parallel.etp_group if item.is_expert else model.parallel.tp_group
        shards = [local] if item.dim is None else gather_shards(local, group)
        whole = rule.transform.merge(shards, item.dim, model.hf)
        if not item.is_expert:
            yield from zip(names, whole, strict=True)
            continue
        parts = [gather_shards(part, model.parallel.ep_group) for part in whole]
        for name, tensors in zip(item.ep_names, zip(*parts, strict=True), strict=True):
            yield from zip(family.find(name)[1], tensors, strict=True)


def takes_part_in_export(model: Model) -> bool:
    """Whether this rank must run `hf_tensors` for the first replica to get its tensors.

    The groups of experts reach across replicas; without any, the first replica is enough.
    """
    parallel = model.parallel
    return parallel.dp_rank == 0 or (model.hf.moe is not None and parallel.ep_size * parallel.etp_size > 1)


def save_hf(model: Model, source: str, out: str, *, mtp: str = "keep") -> None:
    """Write the whole model as a Hugging Face directory; config and tokenizer come from `source`.

    mtp: `keep` or `drop` the multi-token prediction layers of `source`, which training does not change.

    A collective over the whole job. Each stage of the first replica writes one safetensors file; the
    directory appears under its final name only when it is complete.

    Raises OSError on every rank if any rank could not write.
    """
    final = Path(out)
    partial = final.with_name(final.name + ".partial")
    on_rank_0(lambda: make_empty(partial))
    files = _write_shards(model, partial, source, mtp)
    on_rank_0(lambda: _finish(model, Path(source), partial, final, files))


def _write_shards(model: Model, folder: Path, source: str, mtp: str) -> list[tuple[str, list[str]]]:
    """Write this stage's file; every rank's (file, tensor names)."""
    parallel, names, error = model.parallel, [], None
    file_name = f"model-{parallel.pp_rank + 1:05d}-of-{parallel.pp_size:05d}.safetensors"
    if takes_part_in_export(model):
        is_writer = parallel.dp_rank == 0 and parallel.tp_rank == 0
        tensors = {name: tensor.cpu().contiguous() for name, tensor in hf_tensors(model) if is_writer}
        if is_writer:
            try:
                if mtp == "keep":
                    tensors |= mtp_tensors(source, tensors, is_last_stage=parallel.is_last_stage)
                save_file(tensors, str(folder / file_name), metadata={"format": "pt"})
                names = list(tensors)
            except (OSError, ValueError, SafetensorError) as caught:
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
    tell_mtp(config, str(source), count_mtp(str(source), weight_map))
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)
