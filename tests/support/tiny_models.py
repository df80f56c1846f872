"""Tiny random Hugging Face models, written to a directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SHAPE = {
    "vocab_size": 19,  # odd: padded under tensor parallelism
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large enough that every layer matters
}


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
QWEN3_MOE = {  # the first of two stages has no experts
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "mlp_only_layers": [0, 1],
}
GEMMA = {**SHAPE, "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 12}
GEMMA3_LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GLM_TOKENS = {"pad_token_id": 0, "eos_token_id": 1}  # the defaults lie beyond the vocabulary
MLA = {
    **SHAPE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
}
EXPERTS = {  # the first layer is dense
    "first_k_dense_replace": 1,
    "n_routed_experts": 12,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}
DEEPSEEK_YARN = {**YARN_ROPE, "mscale": 0.707, "mscale_all_dim": 1.2, "beta_fast": 24}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)),
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, head_dim=16, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, rope_parameters=YARN_ROPE, tie_word_embeddings=False)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=None)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **QWEN3_MOE)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**GEMMA, layer_types=GEMMA3_LAYERS, rope_parameters=GEMMA3_ROPE, final_logit_softcapping=5.0)
    ),
    "deepseek_v2": lambda: DeepseekV2ForCausalLM(
        DeepseekV2Config(
            **MLA, **EXPERTS, q_lora_rank=None, topk_method="group_limited_greedy", rope_parameters=DEEPSEEK_YARN
        )
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(**MLA, **EXPERTS, q_lora_rank=16, num_mtp_layers=0, rope_parameters=DEEPSEEK_YARN)
    ),
    "mla_dense": lambda: DeepseekV3ForCausalLM(  # without experts, tensor parallelism needs no sequence parallelism
        DeepseekV3Config(**MLA, q_lora_rank=16, first_k_dense_replace=4, num_mtp_layers=0, rms_norm_eps=1e-2)
    ),
    "glm4_moe": lambda: Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **{**SHAPE, **EXPERTS, "n_group": 1, "topk_group": 1},
            attention_bias=True,
            use_qk_norm=True,
            num_mtp_layers=0,
        )
    ),
    "glm": lambda: GlmForCausalLM(GlmConfig(**SHAPE, **GLM_TOKENS, head_dim=16)),
    "glm4": lambda: Glm4ForCausalLM(Glm4Config(**SHAPE, **GLM_TOKENS, head_dim=8, attention_bias=False)),
}
FAMILY_NAMES = tuple(MODELS)
# On tests.distributed's batch no choice of experts is nearer than 4e-5: layouts differ by 1e-6 in scores.
SEEDS = {"deepseek_v2": 13, "deepseek_v3": 50, "glm4_moe": 14}
MOE_FAMILY_NAMES = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe")


def save_tiny(family: str, out: Path) -> Path:
    """Write the random model MODELS[family] to OUT/family."""
    torch.manual_seed(SEEDS.get(family, 7))
    return save_random(MODELS[family](), out / family)


def save_random(model: PreTrainedModel, path: Path) -> Path:
    """Write `model`, as it was drawn, to `path`."""
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide a wrong mapping
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # chooses otherwise than 0 would, and leaves no expert out
                buffer.add_(torch.randn_like(buffer) * 0.1)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(path)
    return path
