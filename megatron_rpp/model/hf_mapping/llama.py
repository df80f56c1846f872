"""Llama 2 and 3: the rules that most dense families share."""

from megatron_rpp.model.hf_config import HFConfig, RawConfig, read_dense
from megatron_rpp.model.hf_mapping.table import Family, Rule
from megatron_rpp.model.hf_mapping.transforms import QKV, GateUp, Vocab

_ATTENTION = "model.layers.{i}.self_attn"
_MLP = "model.layers.{i}.mlp"

RULES = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocab()),
    Rule("decoder.layers.{i}.input_layernorm.weight", ("model.layers.{i}.input_layernorm.weight",)),
    Rule(
        "decoder.layers.{i}.self_attention.linear_qkv.layer_norm_weight",
        ("model.layers.{i}.input_layernorm.weight",),
    ),
    Rule(
        "decoder.layers.{i}.self_attention.linear_qkv.weight",
        (f"{_ATTENTION}.q_proj.weight", f"{_ATTENTION}.k_proj.weight", f"{_ATTENTION}.v_proj.weight"),
        QKV(),
    ),
    Rule("decoder.layers.{i}.self_attention.linear_proj.weight", (f"{_ATTENTION}.o_proj.weight",)),
    Rule("decoder.layers.{i}.pre_mlp_layernorm.weight", ("model.layers.{i}.post_attention_layernorm.weight",)),
    Rule("decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight", ("model.layers.{i}.post_attention_layernorm.weight",)),
    Rule("decoder.layers.{i}.mlp.linear_fc1.weight", (f"{_MLP}.gate_proj.weight", f"{_MLP}.up_proj.weight"), GateUp()),
    Rule("decoder.layers.{i}.mlp.linear_fc2.weight", (f"{_MLP}.down_proj.weight",)),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Rule("output_layer.weight", ("lm_head.weight",), Vocab()),
)


def read(raw: RawConfig) -> HFConfig:
    """What every family that builds on Llama's also refuses: biases, and activations other than SiLU."""
    raw.require("hidden_act", "silu", default="silu")
    raw.require("attention_bias", False, default=False)
    raw.require("mlp_bias", False, default=False)
    return read_dense(raw)


LLAMA = Family(("LlamaForCausalLM",), RULES, read)
