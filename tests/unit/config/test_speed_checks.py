"""Settings of overlap, recomputation, CUDA graphs and profiles that cannot be together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_rpp.config.errors import ConfigError
from megatron_rpp.config.schema import Config
from megatron_rpp.config.validate import validate

Make = Callable[..., Config]
GRAPHS = {"train.cuda_graphs": True}
SELECTIVE = {"memory.recompute": "selective"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"optimizer.overlap_param_gather": True}, "must go with optimizer.overlap_grad_reduce=true"),
    ({"optimizer.overlap_param_gather": True, "optimizer.distributed": False}, "optimizer.distributed=true"),
    ({**SELECTIVE, "memory.recompute_modules": ()}, "memory.recompute_modules is empty"),
    ({**SELECTIVE, "memory.recompute_modules": ("mlp", "mlp")}, "names one twice"),
    ({**SELECTIVE, "memory.recompute_modules": ("attention",)}, "must be one of: core_attn"),
    ({"memory.recompute_modules": ("mlp",)}, "memory.recompute_modules=mlp must go with memory.recompute=selective"),
    ({**GRAPHS, "model.layer_spec": "local"}, "model.layer_spec=local must be te where train.cuda_graphs=true"),
    ({**GRAPHS, "train.micro_batch_tokens": 8192}, "train.micro_batch_tokens=8192 must be 0"),
    ({**GRAPHS, "parallel.pipeline": 2}, "parallel.pipeline=2 must be 1"),
    ({**GRAPHS, "memory.recompute": "full"}, "memory.recompute=full must be none"),
    ({**GRAPHS, "memory.offload": ("gradients",)}, "memory.offload=gradients must be"),
    ({"profile.steps": (98,)}, "profile.steps=98 must be below run.steps=98"),
    ({"profile.steps": (1,), "profile.ranks": (1,)}, "profile.ranks=1 must name some of the 1 ranks"),
    ({"profile.steps": (1,), "profile.ranks": ()}, "must name some of the 1 ranks"),
    ({"profile.steps": (1,), "profile.record": ()}, "profile.record is empty"),
    ({"profile.steps": (1,), "profile.record": ("trace", "nvtx")}, "one of them at a time"),
    ({"profile.record": ("nvtx",)}, "profile.record=nvtx must go with profile.steps"),
    ({"profile.steps": (1, 1)}, "profile.steps=1,1 names one twice"),
    ({"profile.steps": (1,), "profile.ranks": (0, 0)}, "profile.ranks=0,0 names one twice"),
    ({"profile.steps": (1,), "profile.record": ("trace", "trace")}, "profile.record=trace,trace names one twice"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda x: x if isinstance(x, str) else None)
def test_what_cannot_be_together_is_refused(make: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(make(settings), "train")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer.overlap_param_gather": True, "optimizer.overlap_grad_reduce": True},
        {"optimizer.overlap_grad_reduce": True, "optimizer.distributed": False},
        {**SELECTIVE, "memory.recompute_modules": ("core_attn", "mlp", "layernorm")},
        {"memory.recompute": "full"},
        {**GRAPHS, "model.layer_spec": "te", "memory.offload": ("optimizer", "reference")},
        {"profile.steps": (0, 97), "profile.record": ("trace", "memory")},
    ],
)
def test_what_goes_together_passes(make: Make, settings: dict[str, Any]) -> None:
    validate(make(settings), "train")
