"""config.json of families with experts, and what becomes of it in Megatron's configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.schema import ParallelConfig
from megatron_rpp.model.hf_config import HFConfig, MoE
from megatron_rpp.model.hf_mapping import read_hf_config
from megatron_rpp.model.moe_config import moe_settings

SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_hidden_layers": 4, "vocab_size": 9}
QWEN = {
    **SHAPE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
}
MIXTRAL = {**SHAPE, "architectures": ["MixtralForCausalLM"], "num_local_experts": 6, "num_key_value_heads": 2}


def read(folder: Path, values: dict[str, Any], **changes: Any) -> HFConfig:
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    return read_hf_config(str(folder))


def experts(hf: HFConfig) -> MoE:
    assert hf.moe is not None
    return hf.moe


def settings(moe: MoE, **parallel: Any) -> dict[str, Any]:
    hf: Any = replace(HFConfig(*[None] * 12), moe=moe)  # type: ignore[arg-type]
    return moe_settings(hf, ParallelConfig(**parallel), "local")


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_both_transformers_generations_count_the_experts(name: str, tmp_path: Path) -> None:
    """transformers 5 writes num_local_experts where 4 wrote num_experts."""
    values = {k: v for k, v in QWEN.items() if k != "num_experts"}
    assert experts(read(tmp_path, values, **{name: 12})).num_experts == 12


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (True, True, True, True)),
        ({"mlp_only_layers": [0, 2]}, (False, True, False, True)),
        ({"decoder_sparse_step": 2}, (False, True, False, True)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (False, True, False, False)),
    ],
)
def test_qwen3_moe_layers_are_dense_by_step_and_by_list(
    changes: dict[str, Any], layers: tuple[bool, ...], tmp_path: Path
) -> None:
    assert experts(read(tmp_path, QWEN, **changes)).layers == layers


def test_a_model_whose_layers_are_all_dense_has_no_experts(tmp_path: Path) -> None:
    assert read(tmp_path, QWEN, mlp_only_layers=[0, 1, 2, 3]).moe is None


@pytest.mark.parametrize("normalized", [True, False])
def test_qwen3_moe_weighs_experts_as_norm_topk_prob_says(normalized: bool, tmp_path: Path) -> None:
    """Megatron's softmax over the chosen experts alone sums to 1; over all of them, before the choice, it does not."""
    moe = experts(read(tmp_path, QWEN, norm_topk_prob=normalized, moe_intermediate_size=20, num_experts_per_tok=3))
    assert (moe.top_k, moe.ffn_hidden_size) == (3, 20)
    assert settings(moe)["moe_router_pre_softmax"] is not normalized


def test_mixtral_has_experts_as_wide_as_its_mlp_and_a_window_where_there_is_one(tmp_path: Path) -> None:
    hf = read(tmp_path, MIXTRAL)
    assert (experts(hf).num_experts, experts(hf).top_k, experts(hf).ffn_hidden_size) == (6, 2, 96)
    assert hf.sliding_window is None and hf.sliding_layers == () and hf.rope.theta == 1e6 and hf.norm_eps == 1e-5
    windowed = read(tmp_path, MIXTRAL, sliding_window=8)
    assert windowed.sliding_window == 8 and windowed.sliding_layers == (True,) * 4


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7; it must be at most the 6 experts"),
        ({"num_experts_per_tok": 1, "norm_topk_prob": True}, "a normalized score of a single expert"),
        ({"num_experts": 0}, "num_experts=0; it must be a positive whole number"),
        ({"use_sliding_window": True}, "use_sliding_window=True, which is not supported"),
    ],
)
def test_a_router_that_megatron_has_not_is_refused(changes: dict[str, Any], wrong: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, QWEN, **changes)
    assert f"model.path={tmp_path}: its config.json has {wrong}" in str(error.value)


def test_the_router_is_neither_balanced_nor_moved_by_training() -> None:
    """An auxiliary loss would escape the loss scale; a moving bias would change what the next step's ratios mean."""
    moe = MoE(8, 4, 20, (True,) * 4, score="sigmoid", selection_bias=True, scale=2.5, num_groups=4, top_groups=2)
    found = settings(moe, expert=4, expert_tensor=2)
    assert found["moe_router_load_balancing_type"] == "none" and found["moe_aux_loss_coeff"] == 0
    assert found["moe_router_enable_expert_bias"] and found["moe_router_bias_update_rate"] == 0
    assert (found["moe_router_num_groups"], found["moe_router_group_topk"]) == (4, 2)
    assert found["moe_router_topk_scaling_factor"] == 2.5
    assert (found["expert_model_parallel_size"], found["expert_tensor_parallel_size"]) == (4, 2)


def test_only_layers_that_differ_are_listed() -> None:
    """Megatron's checkpoints stack equal layers, as other tools expect them."""
    assert settings(MoE(8, 2, 20, (True,) * 3))["moe_layer_freq"] == 1
    assert settings(MoE(8, 2, 20, (False, True, True)))["moe_layer_freq"] == [0, 1, 1]


def test_a_choice_among_all_groups_is_no_choice_of_groups() -> None:
    found = settings(MoE(8, 2, 20, (True,), num_groups=4, top_groups=4))
    assert found["moe_router_num_groups"] is None and found["moe_router_group_topk"] is None
