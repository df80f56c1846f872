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
            "parallel.pipeline=2 less 2 must divide num_hidden_layers=4 less 3",
        ),
        ({"parallel.pipeline": 2, "parallel.first_stage_layers": 4}, "parallel.virtual_pipeline=1 must divide the 0"),
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


def test_a_context_beyond_mistrals_sliding_window_is_refused(make: Make, model_dir: Path) -> None:
    """Within the window it is full attention, which is what the engine computes."""
    edit(model_dir, "architectures", ["MistralForCausalLM"])
    edit(model_dir, "sliding_window", 2048)
    check_model(make(), "train")
    edit(model_dir, "sliding_window", 1024)
    assert "rollout.context_length=2048 must be at most the model's sliding_window=1024" in message(make())
