"""Servers with float8 weights hold the values that trained layers compute with, where model/server_weights.py says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from megatron_rpp.config.schema import Config
from megatron_rpp.engine.optimizer import make_trainable
from megatron_rpp.engine.score import score
from megatron_rpp.model.build import Model, build_model
from megatron_rpp.model.server_weights import server_dtype, why_other_values
from tests.gpu.families import save
from tests.gpu.recipes import recipes_here
from tests.gpu.served import different
from tests.gpu.site import Site, with_fp8

SAME = ("llama, heads of 128", "qwen3_moe")
SEAMS = "llama, heads of 64"


def scored(site: Site, config: Config) -> Model:
    """A policy behind one pass, in which its layers have quantized their weights."""
    built = build_model(config, site.parallel, path=config.model.path)
    policy, _ = make_trainable(built, config.optimizer, total_steps=1)
    score(site.batch(), policy, None, config)
    return policy


def blockwise(site: Site, family: str, *, params: bool) -> Config:
    if "blockwise" not in recipes_here():
        pytest.skip("this GPU has no blockwise")
    return with_fp8(site.config(save(site, family)), "blockwise", params=params)


def leaves(names: Iterable[str]) -> set[str]:
    return {name.split(".")[-2] for name in names}


@pytest.mark.parametrize("params", [False, True])
@pytest.mark.parametrize("family", SAME)
def test_servers_hold_the_values_that_layers_compute_with(site: Site, family: str, params: bool) -> None:
    config = blockwise(site, family, params=params)
    policy = scored(site, config)
    assert server_dtype(config, policy.hf) == "float8"
    assert different(policy) == []


def test_layers_kept_in_bfloat16_are_so_on_servers(site: Site) -> None:
    config = blockwise(site, SAME[0], params=False)
    config = replace(config, fp8=replace(config.fp8, bf16_first_layers=1))
    assert different(scored(site, config)) == []


def test_blocks_across_seams_are_other_values_and_servers_get_bfloat16(site: Site) -> None:
    config = blockwise(site, SEAMS, params=False)
    policy = scored(site, config)
    assert (why_other_values(config, policy.hf) or "").startswith("head_dim=64")
    assert server_dtype(config, policy.hf) == "bfloat16"
    assert "v_proj" in leaves(different(policy)) <= {"k_proj", "v_proj"}
