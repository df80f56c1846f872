"""Build Megatron-Core GPTModel chunks for this rank and load Hugging Face weights into them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rpp import device
from megatron_rpp.config.hf_config import HFConfig, read_hf_config
from megatron_rpp.config.schema import Config
from megatron_rpp.model.layer_spec import block_spec, resolve_layer_spec
from megatron_rpp.model.load_hf import load_hf_weights
from megatron_rpp.parallel.context import ParallelContext


@dataclass(frozen=True)
class Model:
    """This rank's part of one model: its pipeline chunks (one, or one a virtual stage)."""

    chunks: list[torch.nn.Module]
    hf: HFConfig
    config: TransformerConfig
    parallel: ParallelContext


def build_model(config: Config, parallel: ParallelContext, *, path: str) -> Model:
    """The model in the Hugging Face directory `path`, split as config.parallel says.

    Raises ValueError where the architecture, the layer spec or a tensor of the directory does not fit.
    """
    model = build_empty(read_hf_config(path), config, parallel)
    load_hf_weights(model.chunks, model.hf, path, parallel)
    return model


def build_empty(hf: HFConfig, config: Config, parallel: ParallelContext) -> Model:
    """The model of shape `hf`, split as config.parallel says, with weights yet to be loaded."""
    transformer = transformer_config(hf, config)
    layer_spec = resolve_layer_spec(config.model.layer_spec)
    chunks = [_build_chunk(hf, config, transformer, layer_spec, parallel, i) for i in range(parallel.vpp_size)]
    return Model(chunks, hf, transformer, parallel)


def transformer_config(hf: HFConfig, config: Config) -> TransformerConfig:
    """Megatron's configuration of `hf`, without dropout and without fusions that need apex."""
    dtype = device.dtype(config.model.dtype)
    return TransformerConfig(
        num_layers=hf.num_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.ffn_hidden_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_query_groups,
        kv_channels=hf.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=hf.norm_eps,
        qk_layernorm=hf.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=hf.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            config.parallel.virtual_pipeline if config.parallel.virtual_pipeline > 1 else None
        ),
        sequence_parallel=config.parallel.sequence,
        calculate_per_token_loss=True,  # see engine/loss_scale.py
        use_cpu_initialization=not device.has_cuda(),
        gradient_accumulation_fusion=False,  # raises without apex, even with Transformer Engine
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        batch_p2p_comm=device.has_cuda(),  # gloo pairs isend and irecv by order only
    )


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
    return GPTModel(
        transformer,
        block_spec(transformer, layer_spec, vp_stage),
        vocab_size=padded_vocab_size(hf, config),
        max_sequence_length=hf.max_position_embeddings,
        pre_process=parallel.pp_rank == 0 and chunk == 0,
        post_process=parallel.is_last_stage and chunk == parallel.vpp_size - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=hf.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=hf.rope_theta,  # type: ignore[arg-type]
        rope_scaling=hf.rope_scaling_factor is not None,
        rope_scaling_factor=hf.rope_scaling_factor or 1.0,
        vp_stage=vp_stage,
    ).to(device.current())
