"""Delayed scaling's first scales: a model without any is run once before it is scored."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rpp.config.schema import TrainConfig
from megatron_rpp.engine import score as scoring
from megatron_rpp.engine import train_step as training
from megatron_rpp.engine.fp8_scales import settle_gradient_scales, settle_scales
from megatron_rpp.experience.types import ExperienceBatch


class Layer(torch.nn.Module):
    """What `settle_scales` looks at of a Transformer Engine layer: its history [2, tensors], updated from the top."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {}

    def run(self, amax: float, direction: str = "scaling_fwd") -> None:
        new = SimpleNamespace(amax_history=torch.zeros(2, 3), scale=torch.ones(3))
        self.fp8_meta.setdefault(direction, new).amax_history[0] = amax

    def update(self) -> None:
        if self.fp8_meta:
            history = self.fp8_meta["scaling_fwd"].amax_history
            history[1], history[0] = history[0].clone(), 0.0


class Chain:
    """Products in a row without a bypass: a gradient of 1e-6 ends, as 0, at the first that has no scale yet."""

    def __init__(self, length: int, recipe: str = "delayed", history: int = 2) -> None:
        self.states = [
            SimpleNamespace(amax_history=torch.zeros(history, 2), scale=torch.ones(2)) for _ in range(length)
        ]
        self.layers = [Layer() for _ in range(length)]
        self.chunks = [torch.nn.Sequential(torch.nn.Linear(1, 1), *self.layers)]
        self.config = SimpleNamespace(fp8="hybrid", fp8_recipe=recipe)
        self.passes = 0

    def run(self) -> None:
        self.passes += 1
        gradient = 1e-6
        for layer, state in zip(reversed(self.layers), reversed(self.states), strict=True):
            layer.fp8_meta["scaling_bwd"] = state
            found = torch.tensor([gradient, 0.0])  # of the output; that of the input has no product
            gradient *= float((state.scale[0] * gradient).to(torch.float8_e5m2) != 0)
            state.amax_history = state.amax_history.roll(-1, 0)
            state.amax_history[-1] = found
            if len(state.amax_history) == 1:
                state.amax_history.zero_()
            state.scale = torch.where(found > 0, 57344 / found.clamp(min=1e-12), state.scale)


def make_model(recipe: str | None) -> Any:
    chunk = torch.nn.Sequential(torch.nn.Linear(1, 1), Layer())
    return SimpleNamespace(chunks=[chunk], config=SimpleNamespace(fp8=recipe and "hybrid", fp8_recipe=recipe))


@pytest.fixture(params=["quantization", "fp8"], ids=["te_2_20", "te_before_2_9"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Transformer Engine, which a stand-in takes the place of, and `score` were asked, in order."""
    asked: list[str] = []
    models: list[Any] = []

    def run(batch: Any, model: Any, config: Any) -> dict[str, torch.Tensor]:
        models.append(model)
        asked.append("run")
        model.chunks[0][1].run(3.0)
        return {"logprobs": torch.zeros(1, 2), "entropy": torch.zeros(1, 2)}

    def update(*, forward: bool) -> None:
        assert forward
        asked.append("update")
        for model in models:
            model.chunks[0][1].update()

    engine = ModuleType(f"transformer_engine.pytorch.{request.param}")
    engine.FP8GlobalStateManager = SimpleNamespace(reduce_and_update_fp8_tensors=update)  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    monkeypatch.setattr(scoring, "_score_one", run)
    return asked


BATCH = ExperienceBatch(torch.zeros(1, 2).long(), *torch.ones(2, 1, 2), torch.ones(1).double(), torch.zeros(1).long())


def test_policy_and_reference_have_scales_before_they_are_compared(calls: list[str]) -> None:
    policy, reference, config = make_model("delayed"), make_model("delayed"), Any
    scoring.score(BATCH, policy, reference, config)  # type: ignore[arg-type]
    assert calls == ["run", "update"] * 2 + ["run", "run"]
    calls.clear()
    scoring.score(BATCH, policy, reference, config)  # type: ignore[arg-type]
    assert calls == ["run", "run"], "scales that are there stay as they are"


@pytest.mark.parametrize("recipe", [None, "tensorwise", "blockwise", "mxfp8"])
def test_scales_of_the_pass_itself_need_no_other(calls: list[str], recipe: str | None) -> None:
    settle_scales(make_model(recipe), lambda model: pytest.fail("run for nothing"))
    scoring.score(BATCH, make_model(recipe), None, Any)  # type: ignore[arg-type]
    assert calls == ["run"]


def alone(value: int) -> list[int]:
    return [value]


@pytest.mark.parametrize("history", [1, 2])
@pytest.mark.parametrize(("length", "passes"), [(1, 2), (2, 3), (3, 4)])
def test_every_gradient_has_a_scale_before_the_first_step(length: int, passes: int, history: int) -> None:
    """Each pass reaches one product further; the last finds nothing new, or is known to be the last."""
    model: Any = Chain(length, history=history)
    settle_gradient_scales(model, model.run, alone)
    assert model.passes == passes
    assert all(state.scale[0] > 1e9 for state in model.states)
    settle_gradient_scales(model, model.run, alone)
    assert model.passes == passes, "scales that are there stay as they are"


def test_a_stage_that_is_done_runs_on_with_those_that_are_not() -> None:
    """Else they would wait for it in the next pass."""
    model: Any = Chain(1)
    elsewhere = iter([0, 2, 4, 4])
    settle_gradient_scales(model, model.run, lambda own: [own, next(elsewhere)])
    assert model.passes == 3
    fresh: Any = Chain(1)
    settle_gradient_scales(fresh, fresh.run, lambda own: [own, 1])
    assert fresh.passes == 0, "a resumed run has scales, if not on this stage"


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_gradients_with_scales_of_their_own_pass_are_computed_once(recipe: str) -> None:
    model: Any = Chain(1, recipe)
    settle_gradient_scales(model, model.run, lambda own: pytest.fail("asked for nothing"))
    assert model.passes == 0


def test_an_optimizer_step_throws_the_gradients_of_its_first_passes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Chain(1)
    asked: list[str] = []
    model.chunks[0].zero_grad_buffer = lambda: asked.append("zero")
    model.parallel = SimpleNamespace(dp_group=None)

    def run_pipeline(*_: Any, forward_only: bool, **__: Any) -> dict[str, torch.Tensor]:
        assert not forward_only
        model.run()
        asked.append("run")
        return {"loss/total": torch.tensor(float(model.passes))}

    monkeypatch.setattr(training, "run_pipeline", run_pipeline)
    monkeypatch.setattr(training, "sum_over", lambda _: lambda x: x)
    monkeypatch.setattr(training, "settle_gradient_scales", partial(settle_gradient_scales, gather=alone))
    megatron = SimpleNamespace(zero_grad=lambda: None, step=lambda: (asked.append("step") or True, 1.0, None))
    optimizer: Any = SimpleNamespace(megatron=megatron, schedule=SimpleNamespace(step=lambda increment: None))
    head: Any = None
    for _ in range(2):
        sums, _ = training.optimizer_step(model, optimizer, BATCH, head, TrainConfig())
        asked.append("end")
    assert asked == ["zero", "run"] * 3 + ["step", "end", "zero", "run", "step", "end"]
    assert sums == {"loss/total": 4.0}, "of the last pass alone"
