"""Delayed scaling's first scales: a model without any is run once before it is scored."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rpp.engine import score as scoring
from megatron_rpp.engine.fp8_scales import settle_scales
from megatron_rpp.experience.types import ExperienceBatch


class Layer(torch.nn.Module):
    """What `settle_scales` looks at of a Transformer Engine layer: its history [2, tensors], updated from the top."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {}

    def run(self, amax: float) -> None:
        state = self.fp8_meta.setdefault("scaling_fwd", SimpleNamespace(amax_history=torch.zeros(2, 3)))
        state.amax_history[0] = amax

    def update(self) -> None:
        if self.fp8_meta:
            history = self.fp8_meta["scaling_fwd"].amax_history
            history[1], history[0] = history[0].clone(), 0.0


def make_model(recipe: str | None) -> Any:
    chunk = torch.nn.Sequential(torch.nn.Linear(1, 1), Layer())
    return SimpleNamespace(chunks=[chunk], config=SimpleNamespace(fp8=recipe and "hybrid", fp8_recipe=recipe))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
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

    engine = ModuleType("transformer_engine.pytorch.fp8")
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
