"""Small random models of the families whose layers differ: experts, latent attention, windows, zero-centred norms.

On a GPU their dimensions are those that Transformer Engine's kernels and blocks of 128 x 128 take, on CPU small ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.gpu.site import VOCAB, Site, llama_config
from tests.support.tiny_models import DEEPSEEK_YARN, GEMMA3_ROPE, save_random


def shape(is_tiny: bool, **more: Any) -> dict[str, Any]:
    hidden, ffn, layers, heads = (64, 128, 3, 4) if is_tiny else (512, 1024, 3, 4)
    return {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.06,
        "dtype": "float32",
        **more,
    }


def llama(is_tiny: bool, head_dim: int) -> PreTrainedModel:
    """Keys are 16 times as large as values: in heads of 64 a block of 128 rows holds both."""
    config = llama_config(is_tiny)
    if not is_tiny:
        config.head_dim = head_dim
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(16)
    return model


def qwen3_moe(is_tiny: bool) -> PreTrainedModel:
    """The first layer is dense."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32 if is_tiny else 256}
    heads = {"head_dim": 16 if is_tiny else 128, "tie_word_embeddings": False}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape(is_tiny, **experts, **heads, mlp_only_layers=[0])))


def deepseek_v3(is_tiny: bool) -> PreTrainedModel:
    """Heads of the sizes that its authors' have; the first layer is dense; groups of experts, and a shared one."""
    nope, rope, rank = (16, 8, 32) if is_tiny else (128, 64, 256)
    latent = {
        "num_key_value_heads": 4,
        "q_lora_rank": rank,
        "kv_lora_rank": rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": nope,
    }
    experts = {
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32 if is_tiny else 256,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
    }
    more = {**latent, **experts, "num_mtp_layers": 0, "rope_parameters": DEEPSEEK_YARN, "tie_word_embeddings": False}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**shape(is_tiny, **more)))


def gemma3(is_tiny: bool) -> PreTrainedModel:
    """Windows shorter than the rows, two rotary bases, norms behind attention and MLP."""
    window, head_dim = (6, 16) if is_tiny else (96, 128)
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    more = {"sliding_window": window, "head_dim": head_dim, "query_pre_attn_scalar": head_dim, "layer_types": layers}
    return Gemma3ForCausalLM(Gemma3TextConfig(**shape(is_tiny, **more, rope_parameters=GEMMA3_ROPE)))


MODELS: dict[str, Callable[[bool], PreTrainedModel]] = {
    "llama, heads of 64": lambda is_tiny: llama(is_tiny, 64),
    "llama, heads of 128": lambda is_tiny: llama(is_tiny, 128),
    "qwen3_moe": qwen3_moe,
    "deepseek_v3": deepseek_v3,
    "gemma3": gemma3,
}
OTHERS = ("qwen3_moe", "deepseek_v3", "gemma3")  # than the Llama of most tests


def save(site: Site, name: str) -> Path:
    """The directory of MODELS[name], the same weights each time."""
    path = site.folder / name.replace(", ", "-").replace(" ", "-")
    if not path.exists():
        torch.manual_seed(0)
        save_random(MODELS[name](site.is_tiny), path)
    return path
