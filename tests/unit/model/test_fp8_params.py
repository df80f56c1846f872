"""Parameters that are FP8 tensors: their values, and what they were before they were rounded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_rpp.model import export_hf
from megatron_rpp.model.build import _move
from megatron_rpp.model.fp8_params import fill, is_fp8, keep_original, plain
from megatron_rpp.model.shards import ShardedParameter
from tests.support.fp8_stand_in import Fp8StandIn, install, make_fp8


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def fp8_linear(rows: int = 4, columns: int = 8) -> Any:
    linear: Any = nn.Linear(columns, rows, bias=True, dtype=torch.bfloat16)
    linear.weight.partition_dim = 0
    make_fp8(linear)
    return linear


def test_other_parameters_are_read_where_they_lie_and_written_in_place() -> None:
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    fill(parameter, torch.tensor([1.0, 2.0, 3.0]))
    assert not is_fp8(parameter) and parameter.tolist() == [1.0, 2.0, 3.0]
    assert plain(parameter).data_ptr() == parameter.data_ptr() and not plain(parameter).requires_grad


def test_an_fp8_parameter_is_read_as_what_products_use_and_written_as_it_quantizes() -> None:
    weight = fp8_linear().weight
    value = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    fill(weight, value)
    assert is_fp8(weight) and type(plain(weight)) is Tensor and not plain(weight).requires_grad
    expected = Fp8StandIn.of(value).dequantize()
    assert plain(weight).dtype == torch.bfloat16 and torch.equal(plain(weight), expected)
    assert not torch.equal(expected, value), "the value is one that FP8 rounds"
    x = torch.eye(8, dtype=torch.bfloat16)
    assert torch.equal(torch.nn.functional.linear(x, weight), expected.T)


def test_filling_replaces_what_the_main_weights_start_from() -> None:
    """Else training would start from the weights that the module was drawn with."""
    weight, value = fp8_linear().weight, torch.full((4, 8), 1.05)
    fill(weight, value)
    assert torch.equal(weight.get_high_precision_init_val(), value.bfloat16())
    weight.clear_high_precision_init_val()
    keep_original(weight, value)  # the optimizer has taken it
    assert weight.get_high_precision_init_val() is None


def test_the_distributed_optimizer_takes_the_values_that_were_loaded_and_not_the_rounded_ones() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, Range

    weight, value = fp8_linear().weight, torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    fill(weight, value)
    ranges = {"param_map": {weight: {"param": Range(8, 24)}}}  # this rank's share
    config: Any = SimpleNamespace(fp8_recipe="tensorwise", use_precision_aware_optimizer_no_fp8_or_ds_fp8=False)
    groups = DistributedOptimizer._build_model_and_main_param_groups(
        [{"bf16": [ranges]}], {weight: (0, "bf16", 0)}, [{"params": [weight], "orig_group": {}}], config
    )
    (main,) = (each for found in groups for group in found for each in group if _is_float32(each))
    assert torch.equal(main, value.float().flatten()[8:24])
    assert weight.get_high_precision_init_val() is None, "and the host memory is free"


def _is_float32(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.float32


def test_moving_a_model_to_its_device_leaves_fp8_parameters_as_they_are() -> None:
    """torch's `to` swaps them for new ones: main weights would start from rounded values, and TP attributes be gone."""
    swapped = fp8_linear()
    swapped.to("cpu")
    assert not hasattr(swapped.weight, "get_high_precision_init_val"), "torch no longer swaps: _move is not needed"
    kept = nn.Sequential(fp8_linear(), nn.Linear(2, 2))
    weight, bias = kept[0].weight, kept[0].bias
    _move(kept, torch.device("meta"))
    assert kept[0].weight is weight and kept[0].bias is bias and weight.partition_dim == 0
    assert weight.get_high_precision_init_val() is not None
    assert kept[1].weight.is_meta


def test_exports_give_values_and_plan_their_size_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = fp8_linear().weight
    items = [ShardedParameter("decoder.layers.0.self_attention.linear_proj.weight", weight, None, False)]
    monkeypatch.setattr(export_hf, "sharded_parameters", lambda chunks: iter(items))
    hf: Any = SimpleNamespace(architecture="LlamaForCausalLM", num_mtp_layers=0)
    parallel = SimpleNamespace(tp_group=None, etp_group=None)
    model: Any = SimpleNamespace(chunks=[], hf=hf, parallel=parallel)
    ((name, tensor),) = export_hf.hf_tensors(model)
    assert name == "model.layers.0.self_attn.o_proj.weight" and torch.equal(tensor, plain(weight))
    ((_, empty),) = export_hf.empty_hf_tensors(model)
    assert empty.is_meta and (empty.shape, empty.dtype) == (tensor.shape, torch.bfloat16)
    assert type(empty) is Tensor and type(tensor) is Tensor
