"""Parts of a parameter as a distributed checkpoint stores them: a key, a place in its tensor, a value."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Size, Tensor


@dataclass(frozen=True)
class Piece:
    """A box of the tensor `key`; `value` has its shape less the leading axes that stack layers and experts."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]  # of the box in the global tensor
    prepended: int  # leading axes that `value` lacks; the box has size 1 there
    may_mismatch: bool  # the first dimension may be padded: vocabulary
    value: Tensor

    @classmethod
    def of(cls, tensor: ShardedTensor) -> Piece:
        """From Megatron's description, with data."""
        return cls(
            key=tensor.key,
            global_shape=tuple(tensor.global_shape),
            offsets=tuple(tensor.global_offset),
            prepended=tensor.prepend_axis_num,
            may_mismatch=tensor.allow_shape_mismatch,
            value=tensor.data,
        )

    @property
    def sizes(self) -> Size:
        """Of the box, with every axis of the global tensor."""
        return Size((1,) * self.prepended + tuple(self.value.shape))

    def cut(self, dim: int | None, count: int) -> list[Piece]:
        """At most `count` boxes of equal size along `dim` of the value, the last one smaller where it must be."""
        if dim is None or count == 1:
            return [self]
        cuts, axis = [], self.prepended + dim
        start = self.offsets[axis]
        for part in self.value.chunk(count, dim):
            offsets = (*self.offsets[:axis], start, *self.offsets[axis + 1 :])
            cuts.append(replace(self, offsets=offsets, value=part))
            start += part.shape[dim]
        return cuts
