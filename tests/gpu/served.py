"""The FP8 values that Transformer Engine's layers compute with, beside those that servers are sent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_rpp.model.build import Model
from megatron_rpp.model.export_hf import hf_tensors
from megatron_rpp.model.fp8_params import is_fp8, plain
from megatron_rpp.model.hf_io.fp8_blocks import SCALE_SUFFIX, dequantize
from megatron_rpp.model.shards import ShardedParameter
from megatron_rpp.model.stage_export import StageExport


def held_values(model: Model) -> dict[str, Tensor]:
    """By Hugging Face name, bfloat16, of the matrices that the last pass computed with in FP8.

    Of an FP8 parameter, its own; else of the copy that the layer has made of it: `_fp8_workspaces`, whose keys are the
    parameters' names within their module (Transformer Engine 2.20: linear.py, layernorm_linear.py, grouped_linear.py).
    Powers of two times E4M3 are exact in bfloat16.
    """
    copies: dict[int, Any] = {}
    for chunk in model.chunks:
        for module in chunk.modules():
            workspaces = getattr(module, "_fp8_workspaces", {})
            for leaf, parameter in module.named_parameters(recurse=False):
                if leaf in workspaces:
                    copies[id(parameter)] = workspaces[leaf]

    @torch.no_grad()
    def held(item: ShardedParameter) -> Tensor | None:
        if is_fp8(item.parameter):
            return plain(item.parameter)
        copy = copies.get(id(item.parameter))
        return None if copy is None else copy.dequantize(dtype=torch.bfloat16).view(item.parameter.shape)

    return dict(hf_tensors(model, held))


def different(model: Model) -> list[str]:
    """Matrices whose values on servers of float8 are not those of `held_values`; AssertionError where there are not
    the same ones in FP8."""
    held = held_values(model)
    sent = dict(StageExport(model, torch.float8_e4m3fn).tensors())
    names = {name for name in sent if name + SCALE_SUFFIX in sent}
    assert held and held.keys() == names, f"in FP8 on one side alone: {sorted(held.keys() ^ names)}"
    return [
        name for name in sorted(held) if not torch.equal(held[name], dequantize(sent[name], sent[name + SCALE_SUFFIX]))
    ]
