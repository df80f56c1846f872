"""A tensor of which only some values are known, and which copies only those.

SGLang's weight loaders narrow, split, transpose and join what they load, and then call
`parameter.copy_(piece)`. Given a PartialTensor they do all of that to the values and to the mask alike, and the
copy leaves the parameter's other values as they are: so a change reaches the server's merged and cut parameters
without anyone here knowing their layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from megatron_rpp.rollout.in_server.delta_codec import integers

_aten = torch.ops.aten
_MOVES_VALUES = frozenset(
    {  # their results hold the values of their inputs, in other places; narrow, chunk, reshape, ... come down to these
        *(_aten.view.default, _aten._unsafe_view.default, _aten.expand.default, _aten.alias.default),
        *(_aten.slice.Tensor, _aten.select.int, _aten.unbind.int),
        *(_aten.split.Tensor, _aten.split_with_sizes.default),
        *(_aten.t.default, _aten.transpose.int, _aten.permute.default),
        *(_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.unsqueeze.default),
        *(_aten.detach.default, _aten.clone.default, _aten.cat.default, _aten.stack.default),
    }
)


class PartialTensor(Tensor):
    """known: the values; changed: bool, which of them were sent; of one shape and the same strides.

    Any other use than moving and copying raises NotImplementedError.
    """

    known: Tensor
    changed: Tensor

    @staticmethod
    def __new__(cls, known: Tensor, changed: Tensor) -> PartialTensor:
        assert known.shape == changed.shape and known.stride() == changed.stride()
        wrapper: PartialTensor = Tensor._make_wrapper_subclass(
            cls, known.shape, strides=known.stride(), dtype=known.dtype, device=known.device
        )
        return wrapper

    def __init__(self, known: Tensor, changed: Tensor) -> None:
        self.known, self.changed = known, changed

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PartialTensor({self.dtype}, {list(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MOVES_VALUES:
            return _move(func, args, kwargs)
        if func is _aten.copy_.default and not isinstance(args[0], PartialTensor):
            return _copy_changed(args[0], args[1])
        if func is _aten._to_copy.default:
            of_mask = {key: value for key, value in kwargs.items() if key != "dtype"}
            return PartialTensor(func(args[0].known, **kwargs), func(args[0].changed, **of_mask))
        if func is _aten._local_scalar_dense.default and bool(args[0].changed.all()):
            return func(args[0].known)
        raise NotImplementedError(f"{func} on values of which only the changed ones were sent")


def _move(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same operation on values and masks. A whole tensor joined with a partial one has changed everywhere."""
    values = func(*tree_map_only(PartialTensor, lambda t: t.known, args), **kwargs)
    changed = func(*tree_map_only(Tensor, _mask_of, args), **kwargs)
    if isinstance(values, Tensor):
        return PartialTensor(values, changed)
    return [PartialTensor(*pair) for pair in zip(values, changed, strict=True)]


def _mask_of(tensor: Tensor) -> Tensor:
    return tensor.changed if isinstance(tensor, PartialTensor) else torch.ones_like(tensor, dtype=torch.bool)


def _copy_changed(target: Tensor, source: PartialTensor) -> Tensor:
    """`target.copy_(source)`, but only where the source has changed; the other bits stay as they are."""
    values = source.known.to(device=target.device, dtype=target.dtype).expand(target.shape)
    changed = source.changed.to(device=target.device).expand(target.shape)
    bits = integers(target.detach())
    torch.where(changed, integers(values), bits, out=bits)
    return target
