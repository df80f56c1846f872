"""Build Megatron-Core GPTModel chunks for this rank and load weights into them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rpp import device
from megatron_rpp.config.schema import Config
from megatron_rpp.model.fp8_params import is_fp8
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.model.hf_mapping.mtp import without_mtp
from megatron_rpp.model.layer_spec import block_spec, mtp_spec, resolve_layer_spec
from megatron_rpp.model.layers.mla import set_latent_epsilon
from megatron_rpp.model.layers.rotary import install_rotary
from megatron_rpp.model.load_hf import load_hf_weights
from megatron_rpp.model.load_megatron import is_megatron_directory, load_megatron_weights
from megatron_rpp.model.transformer_config import transformer_config
from megatron_rpp.parallel.context import ParallelContext


@dataclass(frozen=True)
class Model:
    """This rank's part of one model: its pipeline chunks (one, or one a virtual stage)."""

    chunks: list[torch.nn.Module]
    hf: HFConfig
    config: TransformerConfig
    parallel: ParallelContext
    graph_length: int = 0  # positions of every row where layers are replayed as CUDA graphs; 0: they are not


def build_model(config: Config, parallel: ParallelContext, *, path: str) -> Model:
    """The model in `path`, a Hugging Face or a converted Megatron directory, split as config.parallel says.

    Raises ValueError where the architecture, the layer spec or a tensor of the directory does not fit.
    """
    hf = read_hf_config(path)
    model = build_empty(hf, config, parallel)
    if is_megatron_directory(path):
        load_megatron_weights(model.chunks, path)
    else:
        load_hf_weights(
            model.chunks,
            hf,
            path,
            parallel,
            dtype=model.config.params_dtype,
            allow_pickle=config.model.allow_pickle,
            mtp=config.model.mtp,
        )
    return model


def build_frozen(config: Config, parallel: ParallelContext, *, path: str) -> Model:
    """`build_model` of what is never trained: where its parameters are FP8, Transformer Engine keeps neither their
    transposes, which the backward would want, nor the values that an optimizer would start from. Its layers are not
    replayed as CUDA graphs: Megatron captures those in a training step."""
    config = replace(config, train=replace(config.train, cuda_graphs=False))
    with torch.no_grad():
        return build_model(config, parallel, path=path)


def build_empty(hf: HFConfig, config: Config, parallel: ParallelContext, *, mtp: bool = False) -> Model:
    """The model of shape `hf`, split as config.parallel says, with weights yet to be loaded.

    mtp: with its multi-token prediction layers. Its forward would want labels and add to the loss: not for training.
    """
    hf = hf if mtp else without_mtp(hf)
    transformer = transformer_config(hf, config)
    layer_spec = resolve_layer_spec(config.model.layer_spec)
    chunks = [_build_chunk(hf, config, transformer, layer_spec, parallel, i) for i in range(parallel.vpp_size)]
    graph_length = config.rollout.context_length if config.train.cuda_graphs else 0
    return Model(chunks, hf, transformer, parallel, graph_length)


def padded_vocab_size(hf: HFConfig, config: Config) -> int:
    """The vocabulary rounded up to a multiple of model.vocab_divisor x parallel.tensor."""
    multiple = config.model.vocab_divisor * config.parallel.tensor
    return math.ceil(hf.vocab_size / multiple) * multiple


def _build_chunk(
    hf: HFConfig,
    config: Config,
    transformer: TransformerConfig,
    layer_spec: str,
    parallel: ParallelContext,
    chunk: int,
) -> GPTModel:
    vp_stage = chunk if parallel.vpp_size > 1 else None
    block = block_spec(transformer, hf, layer_spec, vp_stage)
    model = GPTModel(
        transformer,
        block,
        vocab_size=padded_vocab_size(hf, config),
        max_sequence_length=hf.max_position_embeddings,
        pre_process=parallel.pp_rank == 0 and chunk == 0,
        post_process=parallel.is_last_stage and chunk == parallel.vpp_size - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=hf.tied_embeddings,
        position_embedding_type="rope",
        rotary_percent=hf.rope.fraction,
        mtp_block_spec=mtp_spec(transformer, block, layer_spec, vp_stage) if hf.num_mtp_layers else None,
        vp_stage=vp_stage,
    )
    _move(model, device.current())
    install_rotary(model, hf)
    set_latent_epsilon(model)
    if hf.embedding_scale != 1.0 and model.pre_process:
        # Rounded to the activations' type, as transformers does: 55.4256 is 55.5 in bfloat16.
        scale = torch.tensor(hf.embedding_scale, dtype=transformer.params_dtype).item()
        model.embedding.register_forward_hook(lambda module, inputs, embedded: embedded * scale)
    return model


def _move(model: torch.nn.Module, where: torch.device) -> None:
    """`model.to(where)`, but for modules with FP8 parameters, which are made on the GPU.

    torch would swap such a parameter for a new one, without what Megatron and Transformer Engine have attached to it:
    its TP attributes and the values that the main weights start from.
    """
    for module in model.modules():
        if not any(is_fp8(parameter) for parameter in module.parameters(recurse=False)):
            module._apply(lambda tensor: tensor.to(where), recurse=False)
