"""What makes steps cheaper leaves them as they are: two steps with it are two steps without, within noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_rpp.config.fields import build, flatten
from megatron_rpp.config.schema import Config
from megatron_rpp.engine.advantages import ShapingState, add_advantages
from megatron_rpp.engine.optimizer import make_trainable
from megatron_rpp.engine.score import score
from megatron_rpp.engine.train_step import train_step
from megatron_rpp.model.build import build_model
from tests.gpu.recipes import recipes_here
from tests.gpu.site import Site, free

Keys = dict[str, Any]
LR = 3e-4  # moves log-probs by far more than rounding does, and not so far that rounding is multiplied


@dataclass(frozen=True)
class Change:
    """Keys of a configuration, and those that it is compared with."""

    keys: Keys
    base: Keys = field(default_factory=dict)

    @property
    def exact(self) -> Keys:
        """What `base` is a rounded form of. Transformer Engine's fused attention has no float32."""
        plain = {"model.dtype": "float32", "model.layer_spec": "local"}
        return {"fp8.recipe": "none"} if "fp8.recipe" in self.base else plain


# Graphs are for padded rows, all as long as the longest of the fixed batch may be.
GRAPHS = Change({"train.cuda_graphs": True}, {"train.micro_batch_tokens": 0, "rollout.context_length": 512})
ANYWHERE = {
    "overlapped gradient sums": Change({"optimizer.overlap_grad_reduce": True}),
    "overlapped gathers": Change({"optimizer.overlap_grad_reduce": True, "optimizer.overlap_param_gather": True}),
    "whole layers recomputed": Change({"memory.recompute": "full"}),
    "attention and MLP recomputed": Change(
        {"memory.recompute": "selective", "memory.recompute_modules": ("core_attn", "mlp")}
    ),
}
IN_FP8 = {
    "ends in bfloat16": Change({"fp8.bf16_first_layers": 1, "fp8.bf16_last_layers": 1}, {"fp8.recipe": "tensorwise"}),
    "gradients in E4M3": Change({"fp8.format": "e4m3"}, {"fp8.recipe": "tensorwise"}),
    "FP8 layers recomputed": Change({"memory.recompute": "full"}, {"fp8.recipe": "tensorwise"}),
}


def after_two_steps(site: Site, config: Config) -> Tensor:
    """[response tokens] log-probs of the fixed batch."""
    policy, optimizer = make_trainable(
        build_model(config, site.parallel, path=config.model.path), config.optimizer, total_steps=10
    )
    for _ in range(2):
        batch = score(site.batch(), policy, None, config)
        batch, _, _ = add_advantages(batch, config, site.parallel, ShapingState())
        train_step(policy, optimizer, batch, config)
    batch = score(site.batch(), policy, None, config)
    assert batch.old_logprobs is not None
    return batch.old_logprobs[batch.loss_mask != 0].cpu()


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().mean().item()


def changes_nothing(site: Site, change: Change) -> None:
    """The bound is twice what rounding does to the base: two that are rounded each in its own way lie no further."""
    plain = {**flatten(site.config(site.llama())), "algorithm.kl_coef": 0.0, "optimizer.lr": LR, **change.base}
    found = {}
    for name, keys in (("base", {}), ("exact", change.exact), ("changed", change.keys)):
        found[name] = after_two_steps(site, build({**plain, **keys}))
        free()
    untrained = build({**plain, "optimizer.lr": 0.0})
    bound = 2 * distance(found["base"], found["exact"])
    assert 0 < bound < distance(found["base"], after_two_steps(site, untrained)), "the steps are lost in the noise"
    difference = distance(found["base"], found["changed"])
    assert difference <= bound, f"mean difference {difference:.2e}, noise {bound:.2e}"


@contextmanager
def graph_generators() -> Iterator[None]:
    """Random generators that CUDA graphs can hold, as a session has them with train.cuda_graphs."""
    model_parallel_cuda_manual_seed(0, use_cudagraphable_rng=True, force_reset_rng=True)
    try:
        yield
    finally:
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)


@pytest.mark.parametrize("name", [*ANYWHERE, "CUDA graphs"])
def test_two_steps_are_those_of_a_plain_run(site: Site, name: str) -> None:
    with graph_generators() if name == "CUDA graphs" else nullcontext():
        changes_nothing(site, ANYWHERE.get(name, GRAPHS))


@pytest.mark.parametrize("name", IN_FP8)
def test_two_steps_in_fp8_are_those_of_a_plain_fp8_run(site: Site, name: str) -> None:
    if "tensorwise" not in recipes_here():
        pytest.skip("this GPU has no tensorwise")
    changes_nothing(site, IN_FP8[name])
