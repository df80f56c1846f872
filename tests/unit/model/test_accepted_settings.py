"""What our checks let pass, Megatron's configuration takes: FP8, recomputation, graphs and stages in every combination.

A run that passes them has started servers, and waited for them, when Megatron has its say.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import transformer_config as megatron

from megatron_rpp import device
from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.fp8_recipes import RULES
from megatron_rpp.config.ranges import CHOICES
from megatron_rpp.config.schema import Config
from megatron_rpp.config.validate import validate
from megatron_rpp.model import transformer_config as ours
from megatron_rpp.model.fp8_shapes import check_fp8_shapes
from megatron_rpp.model.hf_config import HFConfig
from megatron_rpp.model.speed import check_speed_of_model
from tests.unit.model.test_fp8_shapes import DEEPSEEK, EXPERTS, QWEN

Make = Callable[..., Config]
MODULES = tuple(CHOICES["memory.recompute_modules"])
MODELS = {
    "dense": QWEN,
    "latent attention and experts": replace(
        DEEPSEEK, ffn_hidden_size=11008, num_layers=28, moe=replace(EXPERTS, layers=(False, *[True] * 27))
    ),
}
RECOMPUTED: list[dict[str, Any]] = [
    {},
    {"memory.recompute": "full"},
    *({"memory.recompute": "selective", "memory.recompute_modules": (module,)} for module in MODULES),
    {"memory.recompute": "selective", "memory.recompute_modules": ("core_attn", "mlp", "layernorm")},
]
OTHERS: list[dict[str, Any]] = [
    {},
    {"train.cuda_graphs": True},
    {"parallel.pipeline": 2},
    {"train.micro_batch_tokens": 8192},
    {"fp8.params": True},
    {"fp8.bf16_first_layers": 1, "fp8.bf16_last_layers": 14},
    {"fp8.bf16_last_layers": 19, "parallel.pipeline": 2},
    {"fp8.bf16_first_layers": 1, "train.cuda_graphs": True},
    {"parallel.tensor": 2, "parallel.sequence": True},
    {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2},
    {"parallel.context": 2, "train.micro_batch_tokens": 8192},
]


def accepts(config: Config, hf: HFConfig) -> bool:
    """Whether `rpp train` would go on to build `hf`."""
    try:
        validate(config, "train")
        check_fp8_shapes(config, hf)
        check_speed_of_model(config, hf)
    except ConfigError:
        return False
    return True


def pretend_to_have_te(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as Megatron's configuration asks for it, and a GPU."""
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(ours, "resolve_layer_spec", lambda choice: "te")
    monkeypatch.setattr(megatron, "is_te_min_version", lambda version: True)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", len)


@pytest.mark.parametrize("recipe", ["none", *RULES])
@pytest.mark.parametrize("model", MODELS)
def test_megatron_takes_what_our_checks_let_pass(
    make: Make, monkeypatch: pytest.MonkeyPatch, model: str, recipe: str
) -> None:
    pretend_to_have_te(monkeypatch)
    hf, refused, taken = MODELS[model], 0, 0
    for recomputed, others in product(RECOMPUTED, OTHERS):
        settings = {"model.dtype": "bfloat16", "fp8.recipe": recipe, **recomputed, **others}
        config = make(settings)
        if not accepts(config, hf):
            refused += 1
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is deprecated, or needs no recomputation
            try:
                built = ours.transformer_config(hf, config)
            except (ValueError, AssertionError) as error:
                pytest.fail(f"{settings}: {error}")
        assert (built.fp8_recipe == recipe) if built.fp8 else recipe == "none"
        taken += 1
    assert taken >= 20 and refused >= 5, "a test of nothing"


@pytest.mark.parametrize("module", ["layernorm", "moe_act"])
def test_megatron_refuses_what_delayed_scales_are_refused(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """If it ever stops, so may we."""
    kwargs = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "moe_grouped_gemm": True}
    with pytest.raises(ValueError, match="Delayed scaling does not support moe_act and layernorm recompute"):
        megatron.TransformerConfig(
            **kwargs, fp8="hybrid", fp8_recipe="delayed", recompute_granularity="selective", recompute_modules=[module]
        )
