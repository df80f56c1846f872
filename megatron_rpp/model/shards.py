"""This rank's parameters: global names, and how each is split over the TP ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class ShardedParameter:
    """One parameter of this rank."""

    name: str  # with the global layer index
    parameter: torch.nn.Parameter
    dim: int | None  # the dimension split over TP ranks; None: every TP rank holds it whole
    is_tied_copy: bool  # the last stage's own copy of a tied embedding


def sharded_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[ShardedParameter]:
    """Every parameter of the chunks, bare or wrapped in Megatron's DDP."""
    for chunk in chunks:
        model: Any = getattr(chunk, "module", chunk)
        modules = dict(model.named_modules())
        for local_name, parameter in model.named_parameters():
            owner, _, leaf = local_name.rpartition(".")
            tied = model.share_embeddings_and_output_weights and local_name == "output_layer.weight"
            yield ShardedParameter(
                _with_global_layer(local_name, model), parameter, _split_dim(modules[owner], leaf), tied
            )


def _with_global_layer(name: str, model: Any) -> str:
    match = _LAYER.match(name)
    if match is None:
        return name
    layer = model.decoder.layers[int(match.group(1))]
    return _LAYER.sub(f"decoder.layers.{layer.layer_number - 1}.", name)


def _split_dim(module: torch.nn.Module, leaf: str) -> int | None:
    """From the module's class: parameter attributes are not always set, and names do not tell."""
    if "layer_norm" in leaf:  # the norm inside TELayerNormColumnParallelLinear
        return None
    parallel_mode = getattr(module, "parallel_mode", None)  # Transformer Engine's linear layers
    if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding) or parallel_mode == "column":
        return 0
    if isinstance(module, RowParallelLinear) or parallel_mode == "row":
        return 1 if leaf == "weight" else None
    return None
