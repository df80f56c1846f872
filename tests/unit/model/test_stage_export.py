"""FP8 that leaves the trainer: the values that it trains with, and bfloat16 where it trains in that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rpp.config.performance import Fp8Config
from megatron_rpp.config.schema import Config
from megatron_rpp.model import stage_export
from megatron_rpp.model.fp8 import fp8_settings
from megatron_rpp.model.hf_io.fp8_blocks import dequantize, quantize
from megatron_rpp.model.hf_mapping.transforms import QKV, Direct, GateUp
from megatron_rpp.model.server_weights import kept_layers
from megatron_rpp.model.stage_export import StageExport
from tests.unit.model.test_server_weights import HF

LAYERS = HF.num_layers
NAME = "model.layers.{}.mlp.down_proj.weight"


def exported(fp8: Fp8Config, monkeypatch: pytest.MonkeyPatch, weight: Tensor) -> tuple[StageExport, dict[str, Tensor]]:
    """What a float8 export makes of `weight` in each layer, of a model that is trained as `fp8` says."""
    off = {"fp8": None, "fp8_recipe": "delayed", "first_last_layers_bf16": False}
    config = SimpleNamespace(**{**off, **fp8_settings(fp8, "te")}, num_layers=LAYERS)
    model: Any = SimpleNamespace(config=config, hf=HF)
    whole = [(NAME.format(i), weight) for i in range(LAYERS)]
    monkeypatch.setattr(stage_export, "hf_tensors", lambda model, gather: iter(whole))
    monkeypatch.setattr(
        stage_export, "empty_hf_tensors", lambda model: ((name, each.to("meta")) for name, each in whole)
    )
    export = StageExport(model, torch.float8_e4m3fn)
    return export, dict(export.tensors())


@pytest.mark.parametrize(("recipe", "power_of_two"), [("none", False), ("tensorwise", False), ("blockwise", True)])
def test_a_model_trained_in_blocks_leaves_with_its_own_scales(
    recipe: str, power_of_two: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, sent = exported(Fp8Config(recipe=recipe), monkeypatch, weight)
    w8, scales = quantize(weight, power_of_two=power_of_two)
    assert torch.equal(sent[NAME.format(2)].view(torch.uint8), w8.view(torch.uint8))
    assert torch.equal(sent[NAME.format(2) + "_scale_inv"], scales)


def test_layers_that_are_trained_in_bfloat16_leave_so_and_are_what_the_server_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fp8 = Fp8Config(recipe="blockwise", bf16_first_layers=1, bf16_last_layers=1)
    export, sent = exported(fp8, monkeypatch, torch.randn(256, 128).bfloat16())
    plain = [i for i in range(LAYERS) if sent[NAME.format(i)].dtype == torch.bfloat16]
    assert plain == [0, 3] == export.bf16_layers == list(kept_layers(Config(fp8=fp8), HF))
    assert NAME.format(0) + "_scale_inv" not in sent and NAME.format(1) + "_scale_inv" in sent
    planned = [(name, each.dtype, each.shape) for name, each in export.empty()]
    assert planned == [(name, each.dtype, each.shape) for name, each in sent.items()]


def trained(shard: Tensor) -> Tensor:
    """The values that products of recipe blockwise use of a rank's matrix."""
    return dequantize(*quantize(shard, power_of_two=True))


@pytest.mark.parametrize(
    ("transform", "shape", "dim"), [(QKV(), (512, 512), 0), (GateUp(), (512, 512), 0), (Direct(), (512, 256), 1)]
)
def test_the_servers_values_are_those_that_two_tensor_parallel_ranks_train_with(
    transform: QKV | GateUp | Direct, shape: tuple[int, int], dim: int
) -> None:
    """HF's head_dim is 128 and its widths are multiples of that, as `server_weights` asks for."""
    shards = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2)]
    on_trainer = transform.merge([trained(shard) for shard in shards], dim, HF)
    for ours, whole in zip(on_trainer, transform.merge(shards, dim, HF), strict=True):
        assert torch.equal(ours, trained(whole))
