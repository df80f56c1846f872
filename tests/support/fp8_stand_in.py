"""A stand-in for Transformer Engine's FP8 parameters, on CPU: one scale a tensor, as recipe tensorwise makes it.

Like Transformer Engine's it is a tensor of bfloat16 to the outside and computes with what its bytes stand for, has no
storage of its own, cannot be viewed, and quantizes what is copied to it.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from megatron.core import fp8_utils
from torch import Tensor
from torch.utils._pytree import tree_map


class Fp8StandIn(Tensor):
    """`_data` [shape] uint8 and `_scale_inv`, a float32 number."""

    _data: Tensor
    _scale_inv: Tensor

    @staticmethod
    def __new__(cls, data: Tensor, scale_inv: Tensor) -> Fp8StandIn:
        made: Fp8StandIn = Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16, device=data.device)  # type: ignore[attr-defined]
        made._data, made._scale_inv = data, scale_inv
        return made

    @classmethod
    def of(cls, value: Tensor) -> Fp8StandIn:
        return cls(*_quantized(value))

    def dequantize(self) -> Tensor:  # type: ignore[override]
        whole = self._data.view(torch.float8_e4m3fn).float() * self._scale_inv
        return whole.to(torch.bfloat16)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["_data", "_scale_inv"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], meta: None, size: Any, stride: Any) -> Fp8StandIn:
        return Fp8StandIn(parts["_data"], parts["_scale_inv"])

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Fp8StandIn({tuple(self._data.shape)})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0]
        if func is torch.ops.aten.detach.default:
            return Fp8StandIn(first._data, first._scale_inv)
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype", first.dtype) == first.dtype:
            return Fp8StandIn(first._data.clone(), first._scale_inv.clone())
        if func is torch.ops.aten.view.default:
            raise NotImplementedError("FP8 tensors have no views")
        if func is torch.ops.aten.copy_.default and isinstance(first, Fp8StandIn):
            data, scale_inv = _quantized(_plain(args[1]))
            first._data.copy_(data)
            first._scale_inv.copy_(scale_inv)
            return first
        assert not func._schema.is_mutable or not isinstance(first, Fp8StandIn), f"{func} writes to an FP8 tensor"
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))


def _plain(value: Any) -> Any:
    return value.dequantize() if isinstance(value, Fp8StandIn) else value


def _quantized(value: Tensor) -> tuple[Tensor, Tensor]:
    scale = 448 / value.float().abs().max().clamp(min=1e-30)
    return (value.float() * scale).to(torch.float8_e4m3fn).view(torch.uint8), scale.reciprocal()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Megatron take stand-ins for Transformer Engine's tensors; data-parallel size 1."""

    def replace_raw_data(tensor: Fp8StandIn, new: Tensor) -> None:
        new.copy_(tensor._data)
        tensor._data = new

    def cast(parameters: list[Tensor], mains: list[Tensor | None], *_: Any) -> None:
        for parameter, main in zip(parameters, mains, strict=True):
            assert main is not None and main.numel() == parameter.numel()
            parameter.data.copy_(main.to(parameter.dtype).view(parameter.shape))

    monkeypatch.setattr(fp8_utils, "HAVE_TE_FP8_TENSOR_CLASS", True)
    monkeypatch.setattr(fp8_utils, "FP8_TENSOR_CLASS", Fp8StandIn)
    monkeypatch.setattr(fp8_utils, "is_te_min_version", lambda version: True)
    monkeypatch.setattr(fp8_utils, "_modify_underlying_storage_impl", replace_raw_data)
    monkeypatch.setattr(fp8_utils, "_quantize_param_shard_impl", cast)


def make_fp8(module: torch.nn.Module, leaf: str = "weight") -> None:
    """Make a parameter of `module` FP8, drawn at random, as Transformer Engine does under fp8_model_init.

    What it was drawn as is kept beside it for the optimizer (preserve_high_precision_init_val).
    """
    old = getattr(module, leaf)
    drawn = torch.randn(old.shape, dtype=torch.bfloat16)
    new: Any = torch.nn.Parameter(Fp8StandIn.of(drawn))
    new.__dict__.update({name: value for name, value in old.__dict__.items() if not name.startswith("_")})
    new._high_precision_init_val = drawn
    new.get_high_precision_init_val = MethodType(lambda self: getattr(self, "_high_precision_init_val", None), new)
    new.clear_high_precision_init_val = MethodType(
        lambda self: self.__dict__.pop("_high_precision_init_val", None), new
    )
    setattr(module, leaf, new)
