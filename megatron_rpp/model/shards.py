"""This rank's parameters: global names, and how each is split over ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
# The index of a local expert: a module of its own, or one weight of Transformer Engine's grouped module.
_EXPERT = re.compile(r"(?<=\.experts\.local_experts\.)\d+(?=\.)|(?<=\.experts\.linear_fc[12]\.weight)\d+$")
_GROUPED = {"TEColumnParallelGroupedLinear": "column", "TERowParallelGroupedLinear": "row"}
_BIAS = ".router.expert_bias"  # a buffer: no gradient reaches it


@dataclass(frozen=True)
class ShardedParameter:
    """One parameter of this rank, or the selection bias of a router."""

    name: str  # with the global indices of layer and expert
    parameter: Tensor
    dim: int | None  # the dimension split over TP ranks (an expert's: over ETP ranks); None: each holds it whole
    is_tied_copy: bool  # the last stage's own copy of a tied embedding
    ep_names: tuple[str, ...] = ()  # of an expert: what each EP rank holds in this place, in rank order

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to one expert; a router or a shared expert does not."""
        return bool(self.ep_names)


def sharded_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[ShardedParameter]:
    """Every parameter of the chunks, bare or wrapped in Megatron's DDP; then the routers' biases."""
    for chunk in chunks:
        model: Any = getattr(chunk, "module", chunk)
        modules = dict(model.named_modules())
        for local_name, parameter in model.named_parameters():
            owner, _, leaf = local_name.rpartition(".")
            tied = model.share_embeddings_and_output_weights and local_name == "output_layer.weight"
            name, dim = _with_global_layer(local_name, model), _split_dim(modules[owner], leaf)
            if (found := _EXPERT.search(local_name)) is None:
                yield ShardedParameter(name, parameter, dim, tied)
            else:
                layer: Any = modules[local_name.partition(".experts.")[0]]
                ep_rank, ep_names = _with_global_expert(name, int(found[0]), layer)
                yield ShardedParameter(ep_names[ep_rank], parameter, dim, tied, ep_names)
        for local_name, buffer in model.named_buffers():
            if local_name.endswith(_BIAS):
                yield ShardedParameter(_with_global_layer(local_name, model), buffer, None, False)


def _with_global_layer(name: str, model: Any) -> str:
    match = _LAYER.match(name)
    if match is None:
        return name
    layer = model.decoder.layers[int(match.group(1))]
    return _LAYER.sub(f"decoder.layers.{layer.layer_number - 1}.", name)


def _with_global_expert(name: str, local: int, layer: Any) -> tuple[int, tuple[str, ...]]:
    """(this EP rank, the names of expert `local` of every EP rank) in Megatron's MoELayer `layer`."""
    held = layer.num_local_experts
    ep_size, ep_rank = layer.config.num_moe_experts // held, layer.local_expert_indices[0] // held
    return ep_rank, tuple(_EXPERT.sub(str(rank * held + local), name) for rank in range(ep_size))


def _split_dim(module: torch.nn.Module, leaf: str) -> int | None:
    """From the module's class: parameter attributes are not always set, and names do not tell."""
    if "layer_norm" in leaf:  # the norm inside TELayerNormColumnParallelLinear
        return None
    parallel_mode = getattr(module, "parallel_mode", None)  # Transformer Engine's linear layers
    for cls in type(module).__mro__:  # its grouped experts' `parallel_mode` is None where EP or ETP splits them
        parallel_mode = _GROUPED.get(cls.__name__, parallel_mode)
    if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding) or parallel_mode == "column":
        return 0
    if isinstance(module, RowParallelLinear) or parallel_mode == "row":
        return 1 if leaf.startswith("weight") else None
    return None
