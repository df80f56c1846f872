"""FP8: what the configuration excludes, and which recipe runs on which GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fp8_recipes import RULES, token_multiple, why_not
from megatron_rpp.config.ranges import CHOICES
from megatron_rpp.config.schema import Config
from megatron_rpp.config.validate import validate

Make = Callable[..., Config]
BF16 = {"model.dtype": "bfloat16"}
NORMS = {"memory.recompute": "selective", "memory.recompute_modules": ("mlp", "layernorm")}
MOE_ACT = {"memory.recompute": "selective", "memory.recompute_modules": ("moe_act",)}
GPUS = {(8, 0): "A100", (8, 9): "L40S", (9, 0): "H200", (10, 0): "B200", (12, 0): "RTX PRO 6000"}


def test_every_recipe_has_a_rule() -> None:
    assert {"none", *RULES} == set(CHOICES["fp8.recipe"])


@pytest.mark.parametrize(
    ("recipe", "runs_on"),
    [
        ("none", list(GPUS)),
        ("delayed", [(8, 9), (9, 0), (10, 0), (12, 0)]),
        ("tensorwise", [(8, 9), (9, 0), (10, 0), (12, 0)]),
        ("blockwise", [(9, 0), (10, 0)]),
        ("mxfp8", [(10, 0)]),
    ],
)
def test_a_recipe_runs_on_the_architectures_that_have_its_products(recipe: str, runs_on: list[tuple[int, int]]) -> None:
    assert [capability for capability, name in GPUS.items() if not why_not(recipe, name, capability)] == runs_on


def test_what_a_gpu_or_a_library_lacks_is_told() -> None:
    assert why_not("tensorwise", "A100", (8, 0)) == "fp8.recipe=tensorwise needs compute capability 8.9, A100 has 8.0"
    assert why_not("mxfp8", "RTX", (12, 0)).endswith("below 12.0, RTX has 12.0; use tensorwise")
    assert "needs CUDA 12.9 or newer, and 12.8 is installed" in why_not("blockwise", "H200", (9, 0), cuda="12.8")
    assert not why_not("blockwise", "H200", (9, 0), cuda="13.0", engine="2.20.2")
    assert "transformer-engine 2.3 or newer, and 2.2.0" in why_not("blockwise", "H200", (9, 0), engine="2.2.0+cu13")


@pytest.mark.parametrize("recipe", RULES)
def test_each_recipe_passes_with_what_it_needs(make: Make, recipe: str) -> None:
    for command in ("train", "sft"):
        validate(make({**BF16, "fp8.recipe": recipe}), command)  # type: ignore[arg-type]
    if recipe not in ("delayed", "mxfp8"):
        validate(make({**BF16, "fp8.recipe": recipe, "fp8.params": True, "fp8.bf16_last_layers": 2}), "train")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model.dtype": "float32"}, "must go with model.dtype=bfloat16, not float32"),
        ({"model.layer_spec": "local"}, "must go with model.layer_spec=te or auto"),
        ({"fp8.params": True, "optimizer.distributed": False}, "must go with optimizer.distributed=true"),
        ({"fp8.recipe": "delayed", "fp8.bf16_first_layers": 1}, "fp8.bf16_first_layers=1 cannot go with"),
        ({"fp8.recipe": "delayed", "fp8.bf16_last_layers": 2}, "fp8.bf16_last_layers=2 cannot go with"),
        ({"fp8.recipe": "delayed", "fp8.params": True}, "fp8.params=true cannot go with fp8.recipe=delayed"),
        ({"fp8.recipe": "delayed", **NORMS}, "memory.recompute_modules=layernorm cannot go with fp8.recipe=delayed"),
        ({"fp8.recipe": "delayed", **MOE_ACT}, "memory.recompute_modules=moe_act cannot go with fp8.recipe=delayed"),
        ({"fp8.recipe": "delayed", "train.cuda_graphs": True}, "fp8.recipe=delayed cannot go with train.cuda_graphs"),
        ({"fp8.recipe": "mxfp8", "fp8.params": True}, "fp8.params=true cannot go with fp8.recipe=mxfp8"),
    ],
)
def test_what_cannot_run_is_told_before_anything_is_built(make: Make, changes: dict[str, Any], expected: str) -> None:
    config = make({**BF16, "fp8.recipe": "tensorwise", **changes})
    for command in ("train", "sft"):
        with pytest.raises(ConfigError) as caught:
            validate(config, command)  # type: ignore[arg-type]
        assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_rank_has_whole_blocks_of_tokens(make: Make) -> None:
    multiples = {recipe: token_multiple(make({"fp8.recipe": recipe})) for recipe in CHOICES["fp8.recipe"]}
    assert multiples == {"none": 1, "delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
