"""Megatron's TransformerConfig of a model's shape and a run's configuration."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_rpp import device
from megatron_rpp.config.schema import Config, ParallelConfig
from megatron_rpp.model.fp8 import fp8_settings
from megatron_rpp.model.fusions import fusion_settings
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.layer_spec import resolve_layer_spec
from megatron_rpp.model.layers.rotary import attention_scale
from megatron_rpp.model.mla_config import mla_settings, wants_qk_layernorm
from megatron_rpp.model.moe_config import moe_settings
from megatron_rpp.model.speed import speed_settings


def transformer_config(hf: HFConfig, config: Config) -> TransformerConfig:
    """Megatron's configuration of `hf`, without dropout."""
    dtype = device.dtype(config.model.dtype)
    layer_spec = resolve_layer_spec(config.model.layer_spec)
    kind = TransformerConfig if hf.mla is None else MLATransformerConfig
    return kind(
        num_layers=hf.num_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.ffn_hidden_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_query_groups,
        kv_channels=hf.head_dim,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=hf.zero_centered_norm,
        layernorm_epsilon=hf.norm_eps,
        softmax_scale=attention_scale(hf),
        window_size=(hf.sliding_window - 1, 0) if hf.sliding_window else None,  # positions before and behind a token
        window_attn_skip_freq=[int(slides) for slides in hf.sliding_layers] if hf.sliding_window else None,
        rotary_interleaved=hf.rope.interleaved,
        qk_layernorm=wants_qk_layernorm(hf, layer_spec),
        add_bias_linear=False,
        add_qkv_bias=hf.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu if hf.activation == "silu" else _gelu_tanh,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,  # see engine/loss_scale.py
        use_cpu_initialization=not device.has_cuda(),
        mtp_num_layers=hf.num_mtp_layers or None,
        **_split_settings(config.parallel),
        **_exchange_settings(config.parallel),
        **_shape_settings(hf, config),
        **moe_settings(hf, config.parallel, layer_spec),
        **mla_settings(hf, config.parallel, layer_spec),
        **fusion_settings(hf, layer_spec),
        **fp8_settings(config.fp8, layer_spec),
        **speed_settings(config, layer_spec),
    )


def _split_settings(parallel: ParallelConfig) -> dict[str, Any]:
    """Over tensor and pipeline ranks; experts are moe_settings'."""
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers or None,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers or None,
        "sequence_parallel": parallel.sequence,
        "context_parallel_size": parallel.context,
    }


def _exchange_settings(parallel: ParallelConfig) -> dict[str, Any]:
    """How neighbouring stages exchange tensors.

    A batch pairs sends and receives of two ranks by their order alone. Where two interleaved stages are each other's
    predecessor and successor, that hands them each other's tensors; so interleaved stages on GPUs exchange one by
    one while they compute, as Megatron's own training script has them. gloo has no other pairing than by order.
    """
    interleaved = parallel.virtual_pipeline > 1
    return {
        "batch_p2p_comm": device.has_cuda() and not interleaved,
        "overlap_p2p_comm": device.has_cuda() and interleaved,
    }


def _shape_settings(hf: HFConfig, config: Config) -> dict[str, Any]:
    """Whether pipeline stages tell each other the length of each microbatch; else `engine.microbatches` gives all one.

    An interleaved schedule sends to both neighbours at once, which are one rank where there are two stages: shapes
    would be taken for each other's. The allgather dispatcher, also of a model without experts, refuses lengths that
    vary.
    """
    parallel = config.parallel
    varies = config.train.micro_batch_tokens > 0 and parallel.pipeline > 1 and parallel.virtual_pipeline == 1
    if not varies or hf.moe is not None:
        return {}
    return {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}


def _leave(parameter: Tensor) -> Tensor:
    """Every parameter is loaded, so none is drawn. (perform_initialization=False would also leave out the attributes
    that Megatron's gradient norm reads.)"""
    return parameter


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
