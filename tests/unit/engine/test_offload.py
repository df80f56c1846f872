"""FP8 copies of weights, which leave the GPU with what memory.offload names. (Steps are in tests/distributed.)"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rpp.config.performance import MemoryConfig
from megatron_rpp.engine import offload as module
from megatron_rpp.engine.offload import Offload
from tests.support.fp8_stand_in import Fp8StandIn


class Layer(torch.nn.Linear):
    """As Transformer Engine's: a forward leaves an FP8 copy of the weight, and takes one that is there."""

    def __init__(self) -> None:
        super().__init__(16, 16, dtype=torch.bfloat16)
        self._fp8_workspaces: dict[str, Any] = {}

    def run(self) -> None:
        self._fp8_workspaces.setdefault("weight", Fp8StandIn.of(self.weight.detach()))


def make_model(graphs: str = "none") -> Any:
    chunk = torch.nn.Sequential(Layer(), torch.nn.Linear(2, 2))
    chunk[0].run()  # type: ignore[operator]
    return SimpleNamespace(chunks=[chunk], config=SimpleNamespace(cuda_graph_impl=graphs))


def copies(model: Any) -> int:
    return sum(len(getattr(layer, "_fp8_workspaces", {})) for layer in model.chunks[0])


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    def optimizer_tensors(optimizer: Any) -> Iterable[torch.Tensor]:
        return [optimizer]

    monkeypatch.setattr(module, "_optimizer_tensors", optimizer_tensors)

    def made(policy: Any, reference: Any, *offload: str) -> Offload:
        return Offload(MemoryConfig(offload=offload), policy, torch.ones(8), reference, block_bytes=256)  # type: ignore[arg-type]

    return made


@pytest.mark.parametrize("part", ["optimizer", "gradients", "reference"])
def test_the_policys_copies_leave_with_anything_that_does(make: Any, part: str) -> None:
    policy, reference = make_model(), make_model()
    before = policy.chunks[0][0].weight.clone()
    make(policy, reference, part).put_away()
    assert (copies(policy), copies(reference)) == (0, part != "reference")
    assert torch.equal(policy.chunks[0][0].weight, before), "its weights stay: a sync reads them"


def test_they_are_away_again_after_training_and_after_a_checkpoint(make: Any) -> None:
    policy = make_model()
    offload = make(policy, None, "optimizer")
    for phase in (offload.training, offload.saving):
        with phase():
            policy.chunks[0][0].run()
        assert copies(policy) == 0


def test_graphs_keep_the_copies_that_they_were_captured_with(make: Any) -> None:
    policy, reference = make_model("local"), make_model()
    make(policy, reference, "optimizer", "reference").put_away()
    assert (copies(policy), copies(reference)) == (1, 0), "the reference is never graphed"


def test_nothing_leaves_where_nothing_is_to(make: Any) -> None:
    policy = make_model()
    make(policy, None).put_away()
    assert copies(policy) == 1
