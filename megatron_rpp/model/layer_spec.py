"""Which modules a transformer layer is made of: Transformer Engine's, or local ones that run anywhere."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_rpp import device
from megatron_rpp.device import without_te
from megatron_rpp.device.gpus import gpus
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.layers.attention import SDPACoreAttention
from megatron_rpp.model.layers.features import add_features
from megatron_rpp.model.layers.mla import use_local_mla, use_spec_mla
from megatron_rpp.model.layers.norms import RMSNorm
from megatron_rpp.parallel.collectives import gather_objects

logger = logging.getLogger(__name__)


def resolve_layer_spec(choice: str) -> str:
    """`te` or `local` for the config's `auto | te | local`. ValueError where `te` cannot run, with the reason."""
    if choice == "local" or (choice == "auto" and not device.has_cuda()):
        return "local"
    missing = _missing()
    if missing and choice == "te":
        raise ValueError(f"model.layer_spec=te needs {missing}; use auto or local")
    return "local" if missing else "te"


def agreed_layer_spec(choice: str) -> str:
    """As `resolve_layer_spec`, and the same on every rank. A collective over the whole job.

    Raises ValueError where `auto` finds Transformer Engine's layers on some ranks alone.
    """
    own = resolve_layer_spec(choice)
    missing = "" if choice == "local" or own == "te" else _missing()
    found = gather_objects((own, missing))
    odd = {rank: why for rank, (spec, why) in enumerate(found) if spec == "local"}
    if 0 < len(odd) < len(found):
        reason = " / ".join(dict.fromkeys(odd.values()))
        raise ValueError(
            f"model.layer_spec={choice}: {_ranks(odd)} of {len(found)} cannot run Transformer Engine's layers, "
            f"which the others would take: they need {reason}; mend their hosts, or set model.layer_spec=local"
        )
    return own


def _ranks(ranks: Collection[int]) -> str:
    shown = ", ".join(map(str, sorted(ranks)[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{', ...' if len(ranks) > 8 else ''}"


def _missing() -> str:
    return _missing_for_te() if device.has_cuda() else "a GPU, and this process sees none"


@lru_cache(maxsize=1)  # so that `auto` warns once, and a kernel is tried once
def _missing_for_te() -> str:
    """What keeps Transformer Engine's layers from running on a GPU, in words; empty: nothing."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer-engine, which is not installed"
    # A library that is built for another torch, CUDA or GPU ends in many ways: OSError, RuntimeError, ...
    try:
        failed = "imported"
        engine = importlib.import_module("transformer_engine.pytorch")
        failed = f"run on this GPU ({', '.join(sorted({gpu.name for gpu in gpus()}))})"
        _run_a_kernel(engine)
    except torch.OutOfMemoryError:  # of this GPU now: says nothing of the library
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        reason = f"transformer-engine, which is installed and cannot be {failed}: {said}"
        logger.warning("model.layer_spec: local layers, as the others need %s", reason)
        return reason
    return ""


@torch.no_grad()
def _run_a_kernel(engine: Any) -> None:
    """Of Transformer Engine's own, the smallest: one that is built for other architectures tells only then."""
    norm = engine.RMSNorm(1024, params_dtype=torch.bfloat16, device=device.current())
    found = norm(torch.ones(16, 1024, dtype=torch.bfloat16, device=device.current()))
    mean = float(found.float().mean())
    if abs(mean - 1) > 0.01:  # waits for the GPU, whose errors come then
        raise RuntimeError(f"the RMSNorm of ones is {mean}")


def block_spec(
    config: TransformerConfig, hf: HFConfig, layer_spec: str, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The spec of the decoder layers that this rank (and virtual stage) holds, with its final norm."""
    if layer_spec == "te":
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        for layer in block.layer_specs:
            if config.multi_latent_attention:
                use_spec_mla(layer.submodules)
            add_features(layer, hf, config, norm=block.layer_norm)
        return block
    without_te.correct_megatron()
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = local_layers(config, hf)[first : first + get_num_layers_to_build(config, vp_stage=vp_stage)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def mtp_spec(
    config: TransformerConfig, block: TransformerBlockSubmodules, layer_spec: str, vp_stage: int | None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The spec of multi-token prediction layers like the last of `block`; None where this rank holds none."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    spec = get_gpt_mtp_block_spec(config, block, use_transformer_engine=layer_spec == "te", vp_stage=vp_stage)
    if spec is not None and layer_spec == "local":
        for layer in spec.layer_specs:
            layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = RMSNorm
    return spec


def local_layers(config: TransformerConfig, hf: HFConfig) -> list[ModuleSpec]:
    """The local spec of each of the model's layers: with a dense MLP, or with experts."""
    dense, experts = _local_layer(config, hf, None), _local_layer(config, hf, config.num_moe_experts)
    return [experts if has_experts else dense for has_experts in (hf.moe.layers if hf.moe else [False] * hf.num_layers)]


def _local_layer(config: TransformerConfig, hf: HFConfig, num_experts: int | None) -> ModuleSpec:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(
        num_experts=num_experts,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
    )
    layer = spec.submodules
    if config.multi_latent_attention:
        use_local_mla(layer)
    if num_experts:  # Transformer Engine fuses no norm into a router: its checkpoints call it by its own name
        layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    add_features(spec, hf, config, norm=RMSNorm)
    return spec
