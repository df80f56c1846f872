"""The parts of a model as one rank holds them, measured on Megatron's own modules on the meta device.

One layer of each kind is built; a stage is put together from them. So a model of any depth takes no longer than
one of a few layers, and no formula for parameters or activations has to be kept in step with Megatron.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch

from megatron_rpp import device
from megatron_rpp.config.performance import MemoryConfig
from megatron_rpp.config.schema import Config, ModelConfig, ParallelConfig
from megatron_rpp.model.build import Model, build_empty
from megatron_rpp.model.hf_config import HFConfig, without_values
from megatron_rpp.model.hf_mapping.mtp import without_mtp
from megatron_rpp.model.shards import sharded_parameters
from megatron_rpp.plan.fake_rank import fake_rank
from megatron_rpp.plan.microbatch import MicrobatchShape, largest_microbatch
from megatron_rpp.plan.saved import (
    EvenRouting,
    as_transformer_engine,
    packed_params,
    recompute_core_attention,
    saved_bytes,
)

EMBEDDING, NORM, OUTPUT = "embedding", "final_layernorm", "output_layer"
Kind = tuple[bool, bool]  # of a layer: has experts, has a sliding window
# Copies on each TP rank with Transformer Engine; the local layers, which are counted, split them.
_COPIED_BY_TE = (".linear_q_down_proj.", ".linear_kv_down_proj.")
# Of memory.recompute_modules; the others' outputs alone are dropped, which is little, and is counted as kept.
_RECOMPUTED = {"core_attn", "mlp", "moe", "shared_experts"}


@dataclass(frozen=True)
class Part:
    """What one rank holds of a layer, or of what stands before and behind the layers."""

    dense: tuple[int, ...] = ()  # elements of each parameter, in the module's order
    experts: tuple[int, ...] = ()  # those of single experts, which other ranks share
    saved: int = 0  # bytes that autograd keeps of one microbatch
    matrices: int = 0  # elements, of all, that FP8 recipes compute with


@dataclass(frozen=True)
class Parts:
    """A model's parts on each rank of one layout."""

    embedding: Part
    layers: dict[Kind, Part]
    norm: Part
    output: Part  # of a tied model: without the weight, which the embedding has
    logits: int  # elements of a microbatch's [b, S, V / tp_size]; packed [1, T / cp_size, V / tp_size]
    hidden: int  # elements of what a stage hands on for a microbatch
    recomputed: int = 0  # bytes that a layer's backward computes again, of one microbatch, at most


def kinds_of(hf: HFConfig) -> list[Kind]:
    """The kind of each of the model's layers."""
    experts = hf.moe.layers if hf.moe else (False,) * hf.num_layers
    slides = hf.sliding_layers or (False,) * hf.num_layers
    return list(zip(experts, slides, strict=True))


def count_parts(hf: HFConfig, config: Config) -> Parts:
    """The parts as a rank of config.parallel holds them, whatever its pipeline and data-parallel sizes."""
    wanted, parallel = config.model, config.parallel
    # "auto" is Transformer Engine: this is about GPUs, wherever it runs.
    as_te = wanted.layer_spec != "local"
    model = ModelConfig(dtype=wanted.dtype, vocab_divisor=wanted.vocab_divisor, layer_spec="local")
    small = ParallelConfig(
        tensor=parallel.tensor,
        sequence=parallel.sequence,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        context=parallel.context,
        data=_least_data(parallel),
    )
    count = partial(_count, without_values(without_mtp(hf)), model, small, largest_microbatch(config), as_te)
    all_kept, memory = count(MemoryConfig()), _counted(config.memory)
    if memory == MemoryConfig():
        return all_kept
    found = count(memory)
    again = max(0, *(all_kept.layers[kind].saved - layer.saved for kind, layer in found.layers.items()))
    # A layer may keep its input in another type alone; computed again, it has both.
    return replace(found, recomputed=again + found.hidden * device.dtype(config.model.dtype).itemsize)


def _counted(memory: MemoryConfig) -> MemoryConfig:
    """What of `memory` changes the activations that are kept, and nothing else: a key of the cache."""
    if memory.recompute == "full":
        return MemoryConfig(recompute="full")
    modules = tuple(sorted(_RECOMPUTED & set(memory.recompute_modules)))
    if memory.recompute == "none" or not modules:
        return MemoryConfig()
    return MemoryConfig(recompute="selective", recompute_modules=modules)


def _least_data(parallel: ParallelConfig) -> int:
    """The smallest DP size that the experts divide over."""
    ranks = parallel.expert * parallel.expert_tensor
    return ranks // math.gcd(ranks, parallel.tensor * parallel.context)


@lru_cache(maxsize=256)
def _count(
    hf: HFConfig,
    model: ModelConfig,
    parallel: ParallelConfig,
    shape: MicrobatchShape,
    as_te: bool,
    memory: MemoryConfig,
) -> Parts:
    kinds = sorted(set(kinds_of(hf)))
    config = Config(model=model, parallel=parallel, memory=memory)
    with fake_rank(parallel) as context:
        built = build_empty(_with_layers(hf, kinds), config, context)
        (chunk,) = built.chunks
        if as_te:
            as_transformer_engine(chunk)
        recompute_core_attention(chunk)
        saved, logits = _saved_by_part(chunk, hf, shape)
    names = [EMBEDDING, *(f"layers.{i}" for i in range(len(kinds))), NORM, OUTPUT]
    copies = parallel.tensor if as_te else 1
    first, *layers, norm, output = (_part(built, name, saved.get(name, 0), copies) for name in names)
    split = parallel.tensor if parallel.sequence else 1
    hidden = shape.tokens * hf.hidden_size // split
    return Parts(first, dict(zip(kinds, layers, strict=True)), norm, output, logits, hidden)


def _with_layers(hf: HFConfig, kinds: list[Kind]) -> HFConfig:
    """`hf` with one layer of each of `kinds`."""
    return replace(
        hf,
        num_layers=len(kinds),
        moe=replace(hf.moe, layers=tuple(experts for experts, _ in kinds)) if hf.moe else None,
        sliding_layers=tuple(slides for _, slides in kinds) if hf.sliding_layers else (),
    )


def _part(model: Model, name: str, saved: int, copies: int) -> Part:
    prefix = name if name in (EMBEDDING, OUTPUT) else f"decoder.{name}"
    held = [item for item in sharded_parameters(model.chunks) if item.name.startswith(f"{prefix}.")]
    held = [item for item in held if isinstance(item.parameter, torch.nn.Parameter)]  # a router's bias is a buffer

    def size(item: Any) -> int:
        return int(item.parameter.numel()) * (copies if any(part in item.name for part in _COPIED_BY_TE) else 1)

    is_layer = name.startswith("layers.")
    matrices = [item for item in held if is_layer and item.parameter.dim() > 1 and ".router." not in item.name]
    return Part(
        tuple(size(item) for item in held if not item.is_expert),
        tuple(size(item) for item in held if item.is_expert),
        saved,
        sum(size(item) for item in matrices),
    )


def _saved_by_part(chunk: torch.nn.Module, hf: HFConfig, shape: MicrobatchShape) -> tuple[dict[str, int], int]:
    """(bytes saved in each part's forward, elements of the logits) of one microbatch."""
    now = [EMBEDDING]
    model: Any = chunk

    def enter(name: str) -> Callable[..., None]:
        return lambda *unused: now.__setitem__(0, name)

    for i, layer in enumerate(model.decoder.layers):
        layer.register_forward_pre_hook(enter(f"layers.{i}"))
    model.decoder.final_layernorm.register_forward_pre_hook(enter(NORM))
    model.output_layer.register_forward_pre_hook(enter(OUTPUT))
    tokens = torch.empty((shape.rows, shape.length), dtype=torch.int64, device=device.current())
    with saved_bytes(lambda: now[0], chunk.parameters()) as found, EvenRouting(hf.moe):
        logits = chunk(tokens, tokens, attention_mask=None, packed_seq_params=packed_params(shape))
    return dict(found), logits.numel()
