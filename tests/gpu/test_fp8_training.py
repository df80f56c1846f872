"""FP8 trains the demo model as bfloat16 does, and before any update policy and reference agree."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron_rpp.algorithm.kl import kl_estimate
from megatron_rpp.config.schema import Config
from megatron_rpp.engine.score import score
from megatron_rpp.model.build import build_frozen, build_model
from tests.gpu.recipes import recipe_of_parameters, recipes_here
from tests.gpu.site import Site, free, with_fp8
from tests.gpu.sums import train, write_start

SEEDS, STEPS, LAST = (0, 1, 2), 120, 20
LEARNT = 1.2  # nats a token: 3.1 in the first 20 steps, 0.96 in the last of 120 (float32 on CPU)
MOST_KL = 1e-4
_of_bfloat16: list[float] = []  # the same runs for every recipe: found once


def final_losses(site: Site, recipe: str, seeds: Sequence[int], **fp8: bool) -> list[float]:
    """The mean loss of the last steps, for each seed."""
    path, sums = write_start(site)
    steps = 3 if site.is_tiny else STEPS
    config = with_fp8(site.config(path), recipe, **fp8)
    config = replace(
        config,
        train=replace(config.train, batch_size=8 if site.is_tiny else 128),
        optimizer=replace(config.optimizer, warmup_steps=0 if site.is_tiny else 20),
    )
    found = []
    for seed in seeds:
        losses = train(site, config, sums, steps=steps, seed=seed)[2]
        assert losses[-1] < losses[0], "the model has learnt nothing"
        found.append(statistics.fmean(losses[-LAST:]))
        free()
    return found


def within_noise(found: Sequence[float], plain: Sequence[float]) -> bool:
    """Of runs on the same data in the same order: the mean differs by no more than twice the spread of seeds.

    found: of the first seeds of `plain`. The floor of 0.02 nats is for a spread that happens to be small: it is of
    three numbers.
    """
    same = statistics.fmean(plain[: len(found)])
    return abs(statistics.fmean(found) - same) <= max(2 * statistics.stdev(plain), 0.02)


def fp8_trains_as_bfloat16(site: Site, recipe: str, **fp8: bool) -> None:
    """Two runs that have learnt nothing would agree, so that bfloat16's must have."""
    if not _of_bfloat16:
        _of_bfloat16.extend(final_losses(site, "none", SEEDS))
    assert site.is_tiny or max(_of_bfloat16) < LEARNT, _of_bfloat16
    found = final_losses(site, recipe, SEEDS[:2], **fp8)
    assert within_noise(found, _of_bfloat16), f"{recipe}: {found}, bfloat16: {_of_bfloat16}"


def policy_is_reference(site: Site, config: Config) -> None:
    """The token mean of the k3 estimate."""
    policy, reference = (build(config, site.parallel, path=config.model.path) for build in (build_model, build_frozen))
    for _ in range(2):  # also behind a pass that has moved the scales of recipe delayed
        batch = score(site.batch(), policy, reference, config)
        assert batch.old_logprobs is not None and batch.ref_logprobs is not None
        kl = kl_estimate(batch.old_logprobs, batch.ref_logprobs, "k3")[batch.loss_mask != 0].mean().item()
        assert abs(kl) < MOST_KL, f"KL {kl:.2e} before any update"


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_a_recipe_trains_within_noise_of_bfloat16(site: Site, recipe: str) -> None:
    if recipe not in recipes_here():
        pytest.skip(f"this GPU has no {recipe}")
    fp8_trains_as_bfloat16(site, recipe)


def test_fp8_parameters_train_within_noise_of_bfloat16(site: Site) -> None:
    recipe = recipe_of_parameters()
    if recipe is None:
        pytest.skip("this GPU has no recipe for FP8 parameters")
    fp8_trains_as_bfloat16(site, recipe, params=True)


@pytest.mark.parametrize("recipe", ["none", "delayed", "tensorwise", "blockwise", "mxfp8"])
def test_the_kl_before_any_update_is_zero(site: Site, recipe: str) -> None:
    if recipe not in ("none", *recipes_here()):
        pytest.skip(f"this GPU has no {recipe}")
    policy_is_reference(site, with_fp8(site.config(site.llama()), recipe))
