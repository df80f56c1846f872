"""What autograd keeps for the backward, counted without computing anything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_rpp.model.hf_config import MoE
from megatron_rpp.model.layers.attention import SDPACoreAttention
from megatron_rpp.model.layers.norms import RMSNorm
from megatron_rpp.model.layers.packed_attention import slot_params
from megatron_rpp.plan.microbatch import MicrobatchShape


@contextmanager
def saved_bytes(part_of_model: Callable[[], str], parameters: Iterable[Tensor]) -> Iterator[dict[str, int]]:
    """Bytes of the storages that are saved inside, a storage once, by what `part_of_model()` says at the time."""
    known = {parameter.untyped_storage()._cdata for parameter in parameters}
    kept: list[Any] = []  # so that no other storage gets the address of a counted one
    found: dict[str, int] = defaultdict(int)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            kept.append(storage)
            found[part_of_model()] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def packed_params(shape: MicrobatchShape) -> PackedSeqParams | None:
    """What the model is told of the slots; None where rows are padded. Their bounds are values even on "meta"."""
    if not shape.bounds:
        return None
    with torch._C.DisableTorchFunction():  # AlwaysMeta
        bounds = torch.tensor(shape.bounds, dtype=torch.int32, device="cpu")
    return slot_params(bounds, shape.bounds)


class EvenRouting(TorchFunctionMode):
    """What depends on the values of a router has the shape that it has where all experts get equally many tokens.

    Attention is torch's flash attention: on the meta device it would be the one that keeps all scores.
    """

    def __init__(self, moe: MoE | None) -> None:
        super().__init__()
        self._share = moe.top_k / moe.num_experts if moe else 0.0  # of all (token, expert) pairs that is chosen
        self._chosen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "masked_select":
            self._chosen = round(args[0].numel() * self._share)
            return _Selected.apply(args[0], args[1], self._chosen)
        if name == "sum" and args[0].dtype == torch.bool:  # Megatron-Core 0.19 (November 2026) counts the mask first
            self._chosen = round(args[0].numel() * self._share)
        if name == "item" and args[0].is_meta:
            return self._chosen
        if name == "tolist" and args[0].is_meta:  # slots of packed sequences are known
            experts = len(args[0])
            return [(self._chosen + i) // experts for i in range(experts)]
        if name == "scaled_dot_product_attention":
            q, k, v, *mask = args  # torch makes a bool mask one of q's type, and keeps that
            return _Attention.apply(q, k, v, False, *(each.to(q.dtype) for each in mask))
        return func(*args, **(kwargs or {}))


def as_transformer_engine(model: torch.nn.Module) -> None:
    """Have the local modules of `model`, on the meta device, save what Transformer Engine's in their place do.

    That is for a norm its input and a number a token, and for attention queries, keys, values, output and a
    number a head and token; keys and values once for all heads of a group.
    """
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.forward = _Norm.apply  # type: ignore[method-assign]
        elif isinstance(module, SDPACoreAttention) and module.softcap is None:
            module.forward = _core_attention  # type: ignore[method-assign]


def recompute_core_attention(model: torch.nn.Module) -> None:
    """As memory.recompute_modules=core_attn has it. Megatron's way reads the kind of mask back from a tensor, which on
    the meta device has no value."""
    for module in model.modules():
        if getattr(module, "checkpoint_core_attention", False):
            module._checkpointed_attention_forward = partial(_checkpointed, module)  # type: ignore[assignment]


def _checkpointed(module: Any, query: Tensor, key: Tensor, value: Tensor, *mask: Any, **options: Any) -> Any:
    def forward(*qkv: Tensor) -> Any:
        return module.core_attention(*qkv, *mask, **options)

    return tensor_parallel.checkpoint(forward, False, query, key, value)


def _core_attention(query: Tensor, key: Tensor, value: Tensor, *unused: Any, **also_unused: Any) -> Tensor:
    """Padded [S, B, H, D], or packed [T / cp_size, H, D]: a context-parallel rank keeps its own keys and values."""
    if query.dim() == 3:
        return _core_attention(query[:, None], key[:, None], value[:, None])[:, 0]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out: Tensor = _Attention.apply(q, k, v, True)
    return out.permute(2, 0, 1, 3).flatten(start_dim=2)


class _Selected(torch.autograd.Function):
    """`masked_select`, of a known number of elements."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(x, mask)
        return x.new_empty(count)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.new_empty(x.shape)


class _Attention(torch.autograd.Function):
    """q [B, H, S, D], k and v [B, G, S, D or Dv] -> [B, H, S, Dv], in memory [S, B, H, Dv] or, as torch's, [B, S, ...].

    Of the first, the output projection takes a view; of the second, a copy.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequence_first: bool, *mask: Tensor) -> Tensor:
        rows, heads, length, _ = q.shape
        if sequence_first:
            out = q.new_empty(length, rows, heads, v.shape[3]).permute(1, 2, 0, 3)
        else:
            out = q.new_empty(rows, length, heads, v.shape[3]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32), *mask)
        return out
