"""Shapes of what a user passes in: a wrong one would broadcast to a plausible number."""

from __future__ import annotations

from torch import Tensor


def require_shape(shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    """Every tensor that is not None has this shape. ValueError names the one that has not."""
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape} to go with loss_mask")
