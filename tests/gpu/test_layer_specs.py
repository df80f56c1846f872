"""Transformer Engine's layers and local ones are one model; packed sequences are the padded ones."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megatron_rpp.config.schema import Config
from megatron_rpp.engine.score import score
from megatron_rpp.model.build import build_model
from megatron_rpp.model.layers.attention import SDPACoreAttention
from tests.gpu.site import Site


def logprobs_of(site: Site, config: Config) -> Tensor:
    """[response tokens] of the fixed batch, float32."""
    batch = site.batch()
    model = build_model(config, site.parallel, path=config.model.path)
    found = score(batch, model, None, config).old_logprobs
    assert found is not None
    return found[batch.loss_mask != 0].cpu()


def noise_of_bfloat16(site: Site, config: Config) -> tuple[Tensor, float]:
    """(local bfloat16 log-probs, twice their mean distance to local float32 ones on the same batch).

    Another order of the same bfloat16 operations strays no further from float32 than these do, so that two of them
    differ by no more than twice that. The mean: the largest of thousands of tokens is a matter of chance.
    """
    local, exact = (
        logprobs_of(site, replace(config, model=replace(config.model, layer_spec="local", dtype=dtype)))
        for dtype in ("bfloat16", "float32")
    )
    return local, 2 * (local - exact).abs().mean().item()


def te_is_local(site: Site) -> None:
    config = site.config(site.llama())
    local, bound = noise_of_bfloat16(site, config)
    assert 0 < bound < 0.1
    difference = (logprobs_of(site, config) - local).abs().mean().item()
    assert difference <= bound, f"mean difference {difference:.2e}, noise of bfloat16 {bound:.2e}"


def packed_is_padded(site: Site) -> None:
    config = site.config(site.llama())
    padded = replace(config, train=replace(config.train, micro_batch_tokens=0, micro_batch_size=4))
    _, bound = noise_of_bfloat16(site, config)
    difference = (logprobs_of(site, config) - logprobs_of(site, padded)).abs().mean().item()
    assert difference <= bound, f"mean difference {difference:.2e}, noise of bfloat16 {bound:.2e}"


def test_transformer_engine_gives_the_log_probs_of_local_layers(site: Site) -> None:
    te_is_local(site)


def test_packed_sequences_have_the_log_probs_of_padded_ones(site: Site) -> None:
    packed_is_padded(site)


def test_all_layers_are_transformer_engines(site: Site) -> None:
    """Or the tests above would compare local layers with themselves."""
    config = site.config(site.llama())
    model = build_model(config, site.parallel, path=config.model.path)
    (chunk,) = model.chunks
    assert not any(isinstance(module, SDPACoreAttention) for module in chunk.modules())
    projections = [module for name, module in chunk.named_modules() if name.endswith(".linear_qkv")]
    assert len(projections) == model.hf.num_layers
    assert {type(module).__name__ for module in projections} == {"TELayerNormColumnParallelLinear"}
