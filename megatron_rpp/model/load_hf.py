"""Load a Hugging Face directory into this rank's shards, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_rpp.config.hf_config import HFConfig
from megatron_rpp.model.hf_mapping import find_family
from megatron_rpp.model.hf_mapping.transforms import Shard
from megatron_rpp.model.shards import sharded_parameters
from megatron_rpp.parallel.context import ParallelContext


class HFTensors:
    """The safetensors of a Hugging Face directory, by tensor name, memory-mapped."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (self.path / "model.safetensors").exists():
            with safe_open(str(self.path / "model.safetensors"), "pt") as f:
                self._file_of = {name: "model.safetensors" for name in f.keys()}  # noqa: SIM118 - no iterator
        else:
            raise ValueError(f"{path} holds no model.safetensors; save the model with safetensors first")

    def read(self, name: str) -> Tensor:
        """The whole tensor. ValueError where the directory lacks it."""
        if name not in self._file_of:
            raise ValueError(f"{self.path} lacks the tensor {name}, which its config.json implies")
        with safe_open(str(self.path / self._file_of[name]), "pt") as f:
            return f.get_tensor(name)


def load_hf_weights(chunks: Sequence[torch.nn.Module], hf: HFConfig, path: str, parallel: ParallelContext) -> None:
    """Fill every parameter of `chunks` from the directory `path`. ValueError names a tensor that does not fit."""
    family, tensors = find_family(hf.architecture), HFTensors(path)
    for item in sharded_parameters(chunks):
        # A tied model has no lm_head: the last stage's copy is the embedding.
        name = "embedding.word_embeddings.weight" if item.is_tied_copy else item.name
        rule, hf_names = family.find(name)
        shard = Shard(item.dim, parallel.tp_rank, parallel.tp_size, item.parameter.shape[0])
        parts = [tensors.read(n) for n in hf_names]
        try:
            value = rule.transform.split(parts, shard, hf)
            if value.shape != item.parameter.shape:
                wanted = tuple(item.parameter.shape)
                raise ValueError(f"they give {item.name} the shape {tuple(value.shape)} where {wanted} is needed")
        except (RuntimeError, ValueError) as error:
            found = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(hf_names, parts, strict=True))
            raise ValueError(f"{path}: {found} do not fit its config.json: {error}") from error
        with torch.no_grad():
            item.parameter.copy_(value)
