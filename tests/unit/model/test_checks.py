"""Whether a model fits the layout and the lengths, told before anything is built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.schema import Config
from megatron_rpp.model.checks import check_model

Make = Callable[..., Config]


def message(config: Config, command: str = "train") -> str:
    with pytest.raises(ConfigError) as caught:
        check_model(config, command)
    return str(caught.value)


def edit(model_dir: Path, name: str, value: Any) -> None:
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallel.tensor": 2, "parallel.sequence": True, "parallel.pipeline": 2},
        {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "parallel.data": 2},
        {"parallel.pipeline": 3, "parallel.first_stage_layers": 2},
        {"parallel.pipeline": 3, "parallel.first_stage_layers": 1, "parallel.last_stage_layers": 1},
        {"parallel.pipeline": 2, "parallel.first_stage_layers": 3, "parallel.last_stage_layers": 1},
    ],
)
def test_layouts_that_fit_pass(make: Make, changes: dict[str, Any]) -> None:
    check_model(make(changes), "train")
    check_model(make(changes), "sft")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"parallel.tensor": 3}, "parallel.tensor=3 must divide num_attention_heads=4"),
        ({"parallel.tensor": 4}, "parallel.tensor=4 must divide num_key_value_heads=2"),
        ({"parallel.pipeline": 3}, "parallel.pipeline=3 must divide num_hidden_layers=4"),
        (
            {"parallel.pipeline": 2, "parallel.virtual_pipeline": 4},
            "parallel.virtual_pipeline=4 must divide the 2 layers of each stage (num_hidden_layers=4, "
            "parallel.pipeline=2)",
        ),
        ({"parallel.virtual_pipeline": 2}, "parallel.virtual_pipeline=2 must go with parallel.pipeline above 1"),
        ({"parallel.sequence": True}, "parallel.sequence=true must go with parallel.tensor above 1"),
        ({"parallel.first_stage_layers": 2}, "parallel.first_stage_layers and parallel.last_stage_layers must go with"),
        (
            {"parallel.pipeline": 3, "parallel.first_stage_layers": 1},
            "parallel.pipeline=3 less 1 must divide num_hidden_layers=4 less 1",
        ),
        (
            {"parallel.pipeline": 2, "parallel.first_stage_layers": 1, "parallel.last_stage_layers": 2},
            "parallel.first_stage_layers=1 and parallel.last_stage_layers=2 must be all of num_hidden_layers=4",
        ),
        (
            {"parallel.pipeline": 3, "parallel.first_stage_layers": 3, "parallel.last_stage_layers": 3},
            "parallel.first_stage_layers=3 and parallel.last_stage_layers=3 must leave at least a layer for each of "
            "the 1 other stages of num_hidden_layers=4",
        ),
        (
            {"parallel.pipeline": 2, "parallel.first_stage_layers": 4},
            "parallel.first_stage_layers=4 and parallel.last_stage_layers=0 must leave at least a layer",
        ),
        ({"parallel.pipeline": 2, "parallel.last_stage_layers": 5}, "parallel.first_stage_layers=0 and parallel.last"),
        (
            {"rollout.context_length": 4096},
            "rollout.context_length=4096 must be at most the model's max_position_embeddings=2048",
        ),
        ({"rollout.server_tensor": 3}, "rollout.server_tensor=3 must divide num_attention_heads=4"),
        ({"model.path": ""}, "model.path is not set; pass --model.path=DIRECTORY of a model"),
        ({"model.path": "/absent"}, "model.path=/absent must be an existing directory"),
    ],
)
def test_a_layout_or_length_that_does_not_fit_is_named(make: Make, changes: dict[str, Any], expected: str) -> None:
    assert message(make(changes)).startswith(expected)


def test_a_warm_start_checks_its_own_model(make: Make) -> None:
    assert message(make({"sft.init": ""}), "sft").startswith("sft.init is not set")
    assert message(make({"parallel.tensor": 3}), "sft") == "parallel.tensor=3 must divide num_attention_heads=4"
    check_model(make({"model.path": ""}), "sft")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "must hold a valid config.json"),
        ("[]", "must hold a valid config.json: a JSON object, not []"),
        ("{}", "has architecture none named; it must be one of: LlamaForCausalLM, Mistral"),
    ],
)
def test_a_config_json_of_no_model_is_refused(make: Make, model_dir: Path, text: str, expected: str) -> None:
    (model_dir / "config.json").write_text(text)
    assert expected in message(make())


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("architectures", ["GPT2LMHeadModel"], "has architecture GPT2LMHeadModel; it must be one of"),
        ("num_hidden_layers", None, "has num_hidden_layers=None; it must be a positive whole number"),
        ("intermediate_size", 63, "parallel.tensor=2 must divide intermediate_size=63"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    make: Make, model_dir: Path, name: str, value: Any, expected: str
) -> None:
    edit(model_dir, name, value)
    assert expected in message(make({"parallel.tensor": 2}))


def test_a_directory_without_config_json_is_refused(make: Make, model_dir: Path) -> None:
    (model_dir / "config.json").unlink()
    assert message(make()).startswith(f"model.path={model_dir} must hold a readable config.json")


def test_grouped_query_heads_default_to_the_heads(make: Make, model_dir: Path) -> None:
    edit(model_dir, "num_key_value_heads", None)
    check_model(make({"parallel.tensor": 4}), "train")


def test_a_context_may_be_longer_than_a_sliding_window(make: Make, model_dir: Path) -> None:
    edit(model_dir, "architectures", ["MistralForCausalLM"])
    edit(model_dir, "sliding_window", 1024)
    check_model(make(), "train")


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel.data": 2, "parallel.expert": 2},
        {"parallel.tensor": 2, "parallel.sequence": True, "parallel.expert": 2},
        {"parallel.tensor": 2, "parallel.sequence": True, "parallel.expert_tensor": 2},
        {"parallel.data": 4, "parallel.expert": 2, "parallel.expert_tensor": 2},
    ],
)
def test_experts_that_divide_over_tensor_and_data_ranks_pass(
    make: Make, model_dir: Path, changes: dict[str, Any]
) -> None:
    give_experts(model_dir)
    check_model(make(changes), "train")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"parallel.tensor": 2}, "parallel.tensor=2 must go with parallel.sequence=true: the model has experts"),
        ({"parallel.data": 3, "parallel.expert": 3}, "parallel.expert=3 must divide num_experts=4"),
        (
            {"parallel.data": 3, "parallel.expert_tensor": 3},
            "parallel.expert_tensor=3 must divide an expert's width, 20",
        ),
        (
            {"parallel.data": 2, "parallel.expert": 2, "parallel.expert_tensor": 2},
            "parallel.expert=2 x parallel.expert_tensor=2 must divide parallel.tensor=1 x parallel.data=2",
        ),
    ],
)
def test_experts_that_do_not_divide_are_told_by_what(
    make: Make, model_dir: Path, changes: dict[str, Any], expected: str
) -> None:
    give_experts(model_dir)
    assert message(make(changes)) == expected


@pytest.mark.parametrize("name", ["expert", "expert_tensor"])
def test_expert_ranks_of_a_model_without_experts_are_refused(make: Make, name: str) -> None:
    """They would do nothing, silently."""
    wanted = make({"parallel.data": 2, f"parallel.{name}": 2})
    assert message(wanted) == f"parallel.{name}=2 must be 1: the model has no experts"


def test_the_width_of_a_dense_mlp_matters_only_where_there_is_one(make: Make, model_dir: Path) -> None:
    """Mixtral's intermediate_size is an expert's, which tensor parallelism does not split."""
    give_experts(model_dir)
    edit(model_dir, "intermediate_size", 63)
    layout = make({"parallel.tensor": 2, "parallel.sequence": True})
    check_model(layout, "train")
    edit(model_dir, "mlp_only_layers", [0])
    assert message(layout) == "parallel.tensor=2 must divide intermediate_size=63"


def give_experts(model_dir: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    for name, value in {"architectures": ["Qwen3MoeForCausalLM"], **experts}.items():
        edit(model_dir, name, value)
