"""The values of parameters, which may be FP8 tensors of Transformer Engine (fp8.params).

Whoever reads or writes a parameter's values does it here: an FP8 tensor computes as its bfloat16 values, but shares
no memory with them, and the distributed optimizer starts from values that it was made of and no longer holds.
"""

from __future__ import annotations

import torch
from megatron.core import fp8_utils
from torch import Tensor


def is_fp8(parameter: Tensor) -> bool:
    """Whether it is one of Transformer Engine's FP8 tensors, of any recipe."""
    return bool(fp8_utils.is_float8tensor(parameter))


def plain(parameter: Tensor) -> Tensor:
    """The values that matrix products use, in the parameter's nominal dtype; its own memory where it is not FP8."""
    if not is_fp8(parameter):
        return parameter.detach()
    with torch.no_grad():
        values: Tensor = fp8_utils.dequantize_fp8_tensor(parameter.detach())
        return values


def fill(parameter: Tensor, value: Tensor) -> None:
    """Give `parameter` the values of `value`, of its shape; and to the main weights that are yet to be made of it."""
    with torch.no_grad():
        parameter.copy_(value)  # an FP8 tensor's own `copy_` quantizes
    keep_original(parameter, value)


def keep_original(parameter: Tensor, value: Tensor) -> None:
    """Have the distributed optimizer, not yet built, make its float32 main weights of `value`.

    Megatron has Transformer Engine keep what an FP8 parameter was initialized with, in host memory
    (preserve_high_precision_init_val), and its optimizer takes that and not the rounded values. We load after the
    parameter was made, so what is kept is nothing that was ever wanted.
    """
    if (original := _original(parameter)) is not None:
        original.copy_(value)


def _original(parameter: Tensor) -> Tensor | None:
    """The tensor that Transformer Engine keeps on the host, until the optimizer has taken it."""
    get = getattr(parameter, "get_high_precision_init_val", None)
    return get() if get is not None else None
