"""How an SGLang server's tensor parallelism divides a tensor, and what it pads with zeros."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from megatron_rpp.model.hf_config import HFConfig

_VOCAB_MULTIPLE = 64  # SGLang's DEFAULT_VOCAB_PADDING_SIZE
_CPU_FFN_MULTIPLE = 32  # its DEFAULT_MOE_PADDING_SIZE: on CPU every MLP's width, a rank


class Axis(Enum):
    """What a dimension counts."""

    VOCABULARY = "vocab_size"
    HEADS = "num_attention_heads"
    KV_HEADS = "num_key_value_heads"
    FFN = "intermediate size"
    SHARED_FFN = "intermediate size of the shared experts"


@dataclass(frozen=True)
class Cutter:
    """Servers of `tp_size` ranks for the model `hf`, on `device` "cuda" or "cpu"."""

    hf: HFConfig
    tp_size: int
    device: str

    def shares(self, tensor: Tensor, axis: Axis | None, dim: int) -> Iterator[list[Tensor]]:
        """What each rank in turn holds of `tensor`: pieces one behind the other along dimension 0.

        Zeros that pad rows are a piece of their own. Raises ValueError where SGLang refuses the division.
        """
        for rank in range(self.tp_size):
            if axis is None:
                yield [tensor]
                continue
            first, size = self._range(axis, tensor.shape[dim], rank)
            own = tensor.narrow(dim, min(first, tensor.shape[dim]), max(0, min(size, tensor.shape[dim] - first)))
            padding = [*tensor.shape]
            padding[dim] = size - own.shape[dim]
            pieces = [own, tensor.new_zeros(padding)] if padding[dim] else [own]
            yield pieces if dim == 0 or len(pieces) == 1 else [torch.cat(pieces, dim)]

    def _range(self, axis: Axis, length: int, rank: int) -> tuple[int, int]:
        """(first element, number of elements with padding) of `rank`."""
        if axis is Axis.VOCABULARY:
            size = self._vocabulary() // self.tp_size
        elif axis is Axis.HEADS:
            size = self._exact(axis, self._heads(), length // self.hf.num_attention_heads)
        elif axis is Axis.KV_HEADS:
            replicas = max(1, self.tp_size // self._kv_heads())
            size = self._exact(axis, self._kv_heads() * replicas, length // self.hf.num_query_groups)
            rank //= replicas
        else:
            size = self._exact(axis, self._width(axis, length), 1)
        return rank * size, size

    def _exact(self, axis: Axis, count: int, width: int) -> int:
        """Elements a rank of `count` units of `width` elements."""
        if count % self.tp_size:
            raise ValueError(
                f"{axis.value}={count} cannot be divided over SGLang servers of tensor-parallel size {self.tp_size}; "
                "choose another rollout.server_tensor"
            )
        return count // self.tp_size * width

    def _vocabulary(self) -> int:
        padded = _round_up(self.hf.vocab_size, _VOCAB_MULTIPLE)
        return padded if padded % self.tp_size == 0 else _round_up(self.hf.vocab_size, _VOCAB_MULTIPLE * self.tp_size)

    def _kv_heads(self) -> int:
        """On CPU SGLang adds heads of zeros until TP divides them; on GPUs it repeats them."""
        count = self.hf.num_query_groups
        return count if self.device == "cuda" else _round_up(count, self.tp_size)

    def _heads(self) -> int:
        return self._kv_heads() * (self.hf.num_attention_heads // self.hf.num_query_groups)

    def _width(self, axis: Axis, length: int) -> int:
        if self.device == "cuda":
            return length
        moe, experts = self.hf.moe, 1
        if axis is Axis.SHARED_FFN and moe is not None:  # padded one by one, though they are one MLP
            experts = length // moe.ffn_hidden_size
        return experts * _round_up(length // experts, _CPU_FFN_MULTIPLE * self.tp_size)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
