"""Build Megatron-Core GPTModel chunks for this rank and load weights into them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rpp import device
from megatron_rpp.config.schema import Config
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


def build_empty(hf: HFConfig, config: Config, parallel: ParallelContext, *, mtp: bool = False) -> Model:
    """The model of shape `hf`, split as config.parallel says, with weights yet to be loaded.

    mtp: with its multi-token prediction layers. Its forward would want labels and add to the loss: not for training.
    """
    hf = hf if mtp else without_mtp(hf)
    transformer = transformer_config(hf, config)
    layer_spec = resolve_layer_spec(config.model.layer_spec)
    chunks = [_build_chunk(hf, config, transformer, layer_spec, parallel, i) for i in range(parallel.vpp_size)]
    return Model(chunks, hf, transformer, parallel)


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
    ).to(device.current())
    install_rotary(model, hf)
    set_latent_epsilon(model)
    if hf.embedding_scale != 1.0 and model.pre_process:
        # Rounded to the activations' type, as transformers does: 55.4256 is 55.5 in bfloat16.
        scale = torch.tensor(hf.embedding_scale, dtype=transformer.params_dtype).item()
        model.embedding.register_forward_hook(lambda module, inputs, embedded: embedded * scale)
    return model
