"""Transformer Engine's layers are the local ones in other families, too; and experts compute in FP8."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor

from megatron_rpp.config.schema import Config
from megatron_rpp.engine.score import score
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.model.fp8_params import fill, plain
from megatron_rpp.model.hf_io.fp8_blocks import dequantize, quantize
from megatron_rpp.model.layers.attention import SDPACoreAttention
from megatron_rpp.model.layers.features import TwoRopeSelfAttention
from tests.gpu.families import OTHERS, save
from tests.gpu.recipes import recipes_here
from tests.gpu.site import Site, free, with_fp8
from tests.gpu.test_fp8_scales import first_step
from tests.gpu.test_layer_specs import logprobs_of

EXPERTS = "qwen3_moe"
CLASSES = {  # that a layer spec of Transformer Engine's has, by family
    "qwen3_moe": {"TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear", "TEDotProductAttention"},
    "deepseek_v3": {"TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear", "TEDotProductAttention"},
    "gemma3": {"TELayerNormColumnParallelLinear", "TEDotProductAttention", TwoRopeSelfAttention.__name__},
}


def mean_distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().mean().item()


def local_logprobs(site: Site, config: Config, dtype: str) -> Tensor:
    return logprobs_of(site, replace(config, model=replace(config.model, layer_spec="local", dtype=dtype)))


def te_strays_as_local(site: Site, family: str) -> None:
    """From float32, both: two bfloat16 runs may send a token to different experts, and then lie far from each other."""
    config = site.config(save(site, family))
    exact = local_logprobs(site, config, "float32")
    noise = mean_distance(local_logprobs(site, config, "bfloat16"), exact)
    assert 0 < noise < 0.1
    found = mean_distance(logprobs_of(site, config), exact)
    assert found <= 2 * noise, f"{found:.2e} from float32, local bfloat16 {noise:.2e}"


def rounded_logprobs(site: Site, config: Config) -> Tensor:
    """Of local bfloat16 layers whose matrices have gone through FP8 blocks: about what FP8 does to one operand."""
    config = replace(config, model=replace(config.model, layer_spec="local"))
    model = build_model(config, site.parallel, path=config.model.path)
    round_matrices(model)
    batch = site.batch()
    found = score(batch, model, None, config).old_logprobs
    assert found is not None
    return found[batch.loss_mask != 0].cpu()


def round_matrices(model: Model) -> None:
    for chunk in model.chunks:
        for name, parameter in chunk.named_parameters():
            if ".linear_" in name and parameter.dim() == 2:
                fill(parameter, dequantize(*quantize(plain(parameter), power_of_two=True)))


def fp8_experts_compute(site: Site, recipe: str) -> None:
    """Forward within the noise of FP8, and the first gradient is bfloat16's.

    The bound is of two operands that are rounded, each as the matrices are in `rounded_logprobs`, and half as much
    again; an expert that gets other tokens than its own, as wrong padding would have it, is far beyond.
    """
    plain_run = site.config(save(site, EXPERTS))
    plain_run = replace(plain_run, algorithm=replace(plain_run.algorithm, kl_coef=0.0))
    config = with_fp8(plain_run, recipe)
    exact = local_logprobs(site, plain_run, "float32")
    noise = mean_distance(rounded_logprobs(site, plain_run), exact)
    found = mean_distance(logprobs_of(site, config), exact)
    assert 0 < found <= 3 * noise, f"{recipe}: {found:.2e} from float32; matrices in FP8 alone {noise:.2e}"
    free()
    (_, norm), (_, expected) = (first_step(site, each) for each in (config, plain_run))
    assert abs(norm / expected - 1) < 0.1, f"{recipe}: gradient norm {norm:.3e}, in bfloat16 {expected:.3e}"


@pytest.mark.parametrize("family", OTHERS)
def test_transformer_engine_strays_from_float32_as_local_layers_do(site: Site, family: str) -> None:
    te_strays_as_local(site, family)


@pytest.mark.parametrize("family", OTHERS)
def test_a_family_has_transformer_engines_layers(site: Site, family: str) -> None:
    """Or the test above would compare local layers with themselves."""
    config = site.config(save(site, family))
    (chunk,) = build_model(config, site.parallel, path=config.model.path).chunks
    assert not any(isinstance(module, SDPACoreAttention) for module in chunk.modules())
    assert {type(module).__name__ for module in chunk.modules()} >= CLASSES[family]


def test_experts_compute_in_fp8(site: Site) -> None:
    recipes = [recipe for recipe in ("blockwise", "mxfp8", "tensorwise") if recipe in recipes_here()]
    if not recipes:
        pytest.skip("this GPU has no FP8")
    fp8_experts_compute(site, recipes[0])
