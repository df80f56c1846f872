"""config.json of DeepSeek-V2, DeepSeek-V3 and GLM-4.5: defaults, and what would be computed wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.model.hf_config import MLA, HFConfig, MoE
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.model.mla_config import mla_settings, wants_qk_layernorm

SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_hidden_layers": 4, "vocab_size": 9}
V2 = {**SHAPE, "architectures": ["DeepseekV2ForCausalLM"], "n_routed_experts": 64, "num_experts_per_tok": 6}
V3 = {**SHAPE, "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 256}
GLM = {**SHAPE, "architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 128, "num_key_value_heads": 2}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}


def read(folder: Path, values: dict[str, Any], **changes: Any) -> HFConfig:
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    return read_hf_config(str(folder))


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    v2, v3, glm = (read(tmp_path, values) for values in (V2, V3, GLM))
    assert v2.mla == v3.mla == MLA(1536, 512, 128, 64, 128) and glm.mla is None
    assert v2.moe == MoE(64, 6, 1407, (True,) * 4, normalize_top_k=False, shared_ffn_hidden_size=2 * 1407)
    common: dict[str, Any] = {"score": "sigmoid", "selection_bias": True}
    first_dense = {"num_groups": 8, "top_groups": 4, "scale": 2.5, "shared_ffn_hidden_size": 2048}
    assert v3.moe == MoE(256, 8, 2048, (False, False, False, True), **first_dense, **common)
    assert glm.moe == MoE(128, 8, 1408, (False, True, True, True), shared_ffn_hidden_size=1408, **common)
    assert (v2.max_position_embeddings, v3.max_position_embeddings, glm.max_position_embeddings) == (2048, 4096, 131072)
    assert (v2.num_mtp_layers, v3.num_mtp_layers, glm.num_mtp_layers) == (0, 1, 1)
    assert (glm.rope.fraction, glm.rope.interleaved, glm.qkv_bias, glm.qk_norm, glm.norm_eps) == (
        0.5, False, False, False, 1e-5,
    )  # fmt: skip


def test_a_null_q_lora_rank_means_direct_queries(tmp_path: Path) -> None:
    found = read(tmp_path, V2, q_lora_rank=None).mla
    assert found is not None and found.q_lora_rank is None


def test_group_limited_greedy_scores_a_group_by_its_best_expert(tmp_path: Path) -> None:
    found = read(tmp_path, V2, topk_method="group_limited_greedy", n_group=8, topk_group=3).moe
    assert found is not None and (found.num_groups, found.top_groups, found.group_score) == (8, 3, "max")
    greedy = read(tmp_path, V2, topk_method="greedy", n_group=8, topk_group=3).moe
    assert greedy is not None and greedy.num_groups == 1


def test_yarn_constants_reach_megatron(tmp_path: Path) -> None:
    hf = read(tmp_path, V3, rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.8}, rope_theta=5e5)
    found = mla_settings(hf, ParallelConfig(), "local")
    wanted = {
        "rope_type": "yarn",
        "rotary_base": 5e5,
        "rotary_scaling_factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 0.8,
    }
    assert {key: found[key] for key in wanted} == wanted
    plain = mla_settings(read(tmp_path, V3), ParallelConfig(), "local")
    assert (plain["rope_type"], plain["rotary_scaling_factor"]) == ("rope", 1.0)


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        (V2, {"norm_topk_prob": True}, "norm_topk_prob=True"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        (V2, {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        (V2, {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        (V2, {"attention_bias": True}, "attention_bias=True"),
        (V2, {"num_key_value_heads": 2}, "num_key_value_heads=2"),
        (V2, {"topk_method": "group_limited_greedy", "n_group": 64, "topk_group": 3}, "n_group=64 and topk_group=3"),
        (V3, {"rope_interleave": False}, "rope_interleave=False"),
        (V3, {"norm_topk_prob": False}, "norm_topk_prob=false"),
        (V3, {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        (V3, {"rope_scaling": {**YARN, "type": "linear"}}, "rope_type='linear'"),
        (V3, {"rope_scaling": {**YARN, "mscale": 0.7}}, "mscale=0.7 and mscale_all_dim=None"),
        (V3, {"rope_scaling": {**YARN, "mscale_all_dim": 1}}, "mscale=None and mscale_all_dim=1"),
        (V3, {"rope_scaling": {**YARN, "attention_factor": 2.0}}, "attention_factor=2.0"),
        (V3, {"rope_scaling": {**YARN, "truncate": False}}, "truncate=False"),
        (GLM, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (GLM, {"topk_method": "greedy"}, "topk_method='greedy'"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(
    tmp_path: Path, values: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        read(tmp_path, values, **changes)
    assert message in str(error.value) and f"{tmp_path}: its config.json has" in str(error.value)


def test_splits_that_megatron_gets_wrong_are_refused(tmp_path: Path) -> None:
    hf = read(tmp_path, V3, q_lora_rank=6)
    with pytest.raises(ValueError, match=r"parallel\.tensor=4 must divide q_lora_rank=6"):
        mla_settings(hf, ParallelConfig(tensor=4), "local")
    with pytest.raises(ValueError, match=r"parallel\.tensor=2 needs parallel\.sequence=true"):
        mla_settings(hf, ParallelConfig(tensor=2), "te")
    assert mla_settings(hf, ParallelConfig(tensor=2, sequence=True), "te")


def test_only_transformer_engine_learns_of_the_latent_norms_from_qk_layernorm(tmp_path: Path) -> None:
    """Local ones would have their gradients summed over the TP ranks under it, though each rank has them whole."""
    hf = read(tmp_path, V3)
    assert wants_qk_layernorm(hf, "te") and not wants_qk_layernorm(hf, "local")
