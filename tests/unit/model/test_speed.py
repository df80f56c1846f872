"""Which modules a model has to recompute, and what Megatron is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.performance import MemoryConfig
from megatron_rpp.config.schema import Config, ModelConfig, TrainConfig
from megatron_rpp.model.hf_config import MLA, HFConfig, MoE
from megatron_rpp.model.speed import check_speed_of_model, speed_settings

DENSE: HFConfig = HFConfig(*[None] * 12)  # type: ignore[arg-type]
SOME_EXPERTS = replace(DENSE, moe=MoE(8, 2, 64, (False, True)))
ALL_EXPERTS = replace(DENSE, moe=MoE(8, 2, 64, (True, True), shared_ffn_hidden_size=64))
LATENT = replace(DENSE, mla=MLA(None, 512, 128, 64, 128))


def config(*modules: str, recompute: str = "selective", **model: Any) -> Config:
    return Config(memory=MemoryConfig(recompute=recompute, recompute_modules=modules), model=ModelConfig(**model))


@pytest.mark.parametrize(
    ("module", "without", "having"),
    [
        ("mla_up_proj", DENSE, LATENT),
        ("moe", DENSE, SOME_EXPERTS),
        ("moe_act", DENSE, SOME_EXPERTS),
        ("shared_experts", SOME_EXPERTS, ALL_EXPERTS),
        ("mlp", ALL_EXPERTS, SOME_EXPERTS),
    ],
)
def test_a_module_that_the_model_does_not_have_is_refused(module: str, without: HFConfig, having: HFConfig) -> None:
    """Megatron would pass over most of them, and nothing would be recomputed."""
    check_speed_of_model(config(module), having)
    with pytest.raises(ConfigError, match=f"memory.recompute_modules={module} must go with a model "):
        check_speed_of_model(config(module), without)


def test_activations_of_experts_need_a_grouped_product() -> None:
    with pytest.raises(ConfigError, match=r"must go with model\.layer_spec=te"):
        check_speed_of_model(config("moe_act", layer_spec="local"), SOME_EXPERTS)


def test_megatron_is_told_what_to_recompute() -> None:
    assert speed_settings(config(recompute="none"), "local") == {}
    assert speed_settings(config("mlp", "layernorm"), "te") == {
        "recompute_granularity": "selective",
        "recompute_modules": ["mlp", "layernorm"],
    }
    assert speed_settings(config(recompute="full"), "te") == {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }


def test_graphs_need_transformer_engine_and_a_model_without_experts() -> None:
    graphs = Config(train=TrainConfig(cuda_graphs=True))
    assert speed_settings(graphs, "te") == {"cuda_graph_impl": "local"}
    with pytest.raises(ConfigError, match="which are not here"):
        speed_settings(graphs, "local")
    check_speed_of_model(graphs, DENSE)
    with pytest.raises(ConfigError, match="a model without experts"):
        check_speed_of_model(graphs, SOME_EXPERTS)
